"""XAttention: blocks chosen by the weights of antidiagonals (Xu et al., arXiv:2503.16428)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve.index import BlockIndex
from attnsieve.methods.base import BlockMethod
from attnsieve.selection import select_from_scores

# Sampled logits held at once; 2^26 float32 are 256 MB.
_CHUNK = 1 << 26


@dataclass(frozen=True)
class XAttention(BlockMethod):
    """The fewest blocks whose antidiagonals hold ``tau`` of the row's sampled weight.

    Scores are :func:`antidiagonal_mass`. The first and the diagonal blocks are always kept and
    count towards the share. The public code's sizes and ``tau``; unlike there, attention is causal
    to the element and query heads share their keys. Windows are not part of the method and are
    refused.
    """

    tau: float = 0.9
    stride: int = 8
    block_q: int = 128
    block_k: int = 128

    def select(
        self, q, k, *, causal, window=None, softmax_scale=None, layer_idx=None
    ) -> BlockIndex:
        if window is not None:
            raise NotImplementedError("XAttention: window is not part of the method")
        blocks = dict(block_q=self.block_q, block_k=self.block_k, causal=causal)
        mass = antidiagonal_mass(q, k, stride=self.stride, softmax_scale=softmax_scale, **blocks)
        # The rule takes a softmax over its scores, which makes shares of logarithms of masses.
        return select_from_scores(
            mass.log(), q.shape[2], k.shape[2], top_p=self.tau, sink_blocks=1, **blocks
        )


def antidiagonal_mass(
    q: Tensor,
    k: Tensor,
    *,
    stride: int,
    block_q: int = 128,
    block_k: int = 128,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention weights of blocks, from one logit per ``stride x stride`` pairs of rows and keys.

    That logit is the mean over the pairs' antidiagonal, on which every row and every key lies once:
    a product of vectors of ``stride * D`` elements, so all of them take ``1 / stride`` of the
    multiplications of dense logits. A softmax runs over the squares that hold a visible pair; one
    on the diagonal counts whole.

    Args:
        q: ``[B, Hq, Sq, D]``; k: ``[B, Hkv, Sk, D]``. Rows past a ragged end count as zeros.
        stride: divides both blocks.
        causal: query row i sees keys ``j <= i + Sk - Sq``.
        softmax_scale: default ``1 / sqrt(D)``.

    Returns:
        float32 ``[B, Hq, nQ, nK]``, sums of weights over the squares of a block.

    Raises:
        ValueError: stride does not divide a block.
    """
    if stride < 1 or block_q % stride or block_k % stride:
        raise ValueError(f"stride: {stride} does not divide blocks of {block_q} and {block_k}")
    (batch, num_heads, rows, head_dim), keys = q.shape, k.shape[2]
    scale = (head_dim**-0.5 if softmax_scale is None else softmax_scale) / stride
    # A square's row t meets its key stride - 1 - t.
    q = _squares(q, stride).flatten(3)
    k = _squares(k, stride).flip(3).flatten(3).transpose(2, 3)
    (num_rows, num_columns), group = (q.shape[2], k.shape[3]), num_heads // k.shape[1]
    first_keys = torch.arange(num_columns, device=q.device) * stride
    last_rows = torch.arange(1, num_rows + 1, device=q.device) * stride - 1
    mass = q.new_empty(
        (batch, num_heads, -(-rows // block_q), -(-keys // block_k)), dtype=torch.float32
    )
    if mass.numel() == 0:
        return mass
    at_once = max(1, _CHUNK * stride // max(1, batch * num_heads * num_columns * block_q))
    for first in range(0, mass.shape[2], at_once):
        part = slice(first * block_q // stride, (first + at_once) * block_q // stride)
        logits = q[:, :, part].unflatten(1, (-1, group)).flatten(2, 3) @ k
        logits = logits.float().mul_(scale).view(batch, num_heads, -1, num_columns)
        if causal:
            hidden = first_keys > last_rows[part, None] + (keys - rows)
            # The second fill is for rows that see nothing.
            weights = logits.masked_fill_(hidden, -torch.inf).softmax(-1).masked_fill_(hidden, 0)
        else:
            weights = logits.softmax(-1)
        mass[:, :, first : first + at_once] = _block_sums(weights, block_q, block_k, stride)
    return mass


def _block_sums(weights: Tensor, block_q: int, block_k: int, stride: int) -> Tensor:
    per_row, per_column = block_q // stride, block_k // stride
    ragged = (0, -weights.shape[3] % per_column, 0, -weights.shape[2] % per_row)
    weights = torch.nn.functional.pad(weights, ragged).unflatten(3, (-1, per_column)).sum(4)
    return weights.unflatten(2, (-1, per_row)).sum(3)


def _squares(x: Tensor, stride: int) -> Tensor:
    """``[B, H, S, D]`` to ``[B, H, ceil(S / stride), stride, D]``, zeros behind the last row."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % stride))
    return padded.unflatten(2, (-1, stride))
