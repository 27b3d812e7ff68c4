"""Scores for the token selectors, the rule by sorting, and the functions under test on a device."""

from __future__ import annotations

import functools
import math

import torch
from torch.utils._pytree import tree_map_only

from cases import randn

NAN, INF = math.nan, math.inf


class OnDevice:
    """A module's functions with their operands on a device and the results back on the CPU."""

    def __init__(self, module, device):
        self.module, self.device = module, device

    def _run(self, name, *args, **options):
        args, options = tree_map_only(torch.Tensor, self.to_device, (args, options))
        result = getattr(self.module, name)(*args, **options)
        return tree_map_only(torch.Tensor, lambda x: x.cpu(), result)

    def to_device(self, x):
        return x.to(self.device)

    def __getattr__(self, name):
        return functools.partial(self._run, name)


def scores_of(kind, shape=(2, 3, 300), seed=0):
    """0 normal, 1 a coarse grid full of ties, 2 all equal, 3 specials, 4 all -inf, 5 all NaN."""
    scores = randn(shape, seed=seed)
    if kind == 1:
        return scores.round()
    if kind == 3:
        special = torch.tensor([NAN, -INF, INF, 0.0, -0.0, 3e38, -3e38, 1e-45, -1e-45])
        generator = torch.Generator().manual_seed(9)
        chosen = torch.randint(0, 2 * len(special), shape, generator=generator)
        return torch.where(chosen < len(special), special[chosen % len(special)], scores)
    return scores if kind == 0 else torch.full_like(scores, {2: 0.5, 4: -INF, 5: NAN}[kind])


def by_stable_sort(scores, k):
    """The rule by torch.sort alone: NaN below -inf through a second key, ties by stability."""
    keys = torch.where(scores == 0, 0.0, scores)
    order = torch.where(keys.isnan(), -INF, keys).sort(dim=-1, descending=True, stable=True).indices
    last = keys.isnan().gather(-1, order).int().sort(dim=-1, stable=True).indices
    return order.gather(-1, last)[..., :k].sort(-1).values.int()


def lists_of(index):
    """Nested lists without padding; checks that what is behind the counts is -1."""
    beyond = torch.arange(index.capacity) >= index.counts.unsqueeze(-1)
    assert (index.indices[beyond] == -1).all()
    rows = zip(index.indices.flatten(0, -2), index.counts.flatten().tolist(), strict=True)
    return [row[:count].tolist() for row, count in rows]
