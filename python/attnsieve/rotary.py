"""Pairs of dims that rotary position embeddings (RoPE) turn together.

Two layouts are in use: "half", that of transformers, where pair i is the dims ``i`` and
``i + D / 2``; and "interleaved", where it is ``2 * i`` and ``2 * i + 1``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["from_pairs", "rotation", "to_pairs"]


def to_pairs(x: Tensor, interleaved: bool = False) -> Tensor:
    """``[..., D]`` to ``[..., D / 2, 2]``."""
    if interleaved:
        return x.unflatten(-1, (-1, 2))
    return x.unflatten(-1, (2, -1)).transpose(-1, -2)


def from_pairs(pairs: Tensor, interleaved: bool = False) -> Tensor:
    """``[..., D / 2, 2]`` to ``[..., D]``."""
    return (pairs if interleaved else pairs.transpose(-1, -2)).flatten(-2)


def rotation(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """complex128 ``[..., D / 2]``: what RoPE multiplies the pairs at ``positions [...]`` by."""
    angles = positions.double().unsqueeze(-1) * inv_freq.double()
    return torch.polar(torch.ones_like(angles), angles)
