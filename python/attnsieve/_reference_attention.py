"""What the float64 oracles share: softmax over chosen pairs, and sequences out of their caches."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax_attention(
    scores: Tensor, v: Tensor, times: Tensor, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One head: softmax over the pairs with ``times > 0``, each weighted by ``times``.

    ``sink`` is one more logit that has no value vector. Returns out ``[Sq, D]``, lse ``[Sq]``.
    """
    seen = times > 0
    scores = scores.masked_fill(~seen, -math.inf)
    row_max = torch.full((scores.shape[0],), -math.inf, dtype=torch.float64, device=scores.device)
    if scores.shape[1] > 0:
        row_max = scores.amax(dim=1)
    if sink is not None:
        row_max = torch.maximum(row_max, sink.double())
    shift = row_max.masked_fill(row_max == -math.inf, 0.0).detach()  # cancels
    weights = torch.where(seen, times * torch.exp(scores - shift[:, None]), 0.0)
    row_sum = weights.sum(dim=1)
    if sink is not None:
        row_sum = row_sum + torch.exp(sink.double() - shift)
    v = v.double()
    finite = v.isfinite()
    out = weights @ v.masked_fill(~finite, 0.0)
    # 0 * NaN is NaN, so values that are not finite are added to the rows that see them, one by one.
    for key in torch.nonzero(~finite.all(dim=1) & seen.any(dim=0)).flatten().tolist():
        spoiled = weights[:, key, None] * v[key].masked_fill(finite[key], 0.0)
        out = torch.where(seen[:, key, None], out + spoiled, out)
    empty = row_sum == 0
    row_sum = row_sum.masked_fill(empty, 1.0)  # a gradient through 0 / 0 would be NaN
    out = torch.where(empty[:, None], 0.0, out / row_sum[:, None])
    return out, torch.where(empty, -math.inf, torch.log(row_sum) + shift)


def from_pages(cache: Tensor, table: Tensor, seqlen_k: int) -> tuple[Tensor, Tensor]:
    """One sequence's rows of ``cache [num_pages, page_size, H, D]``: ``[1, H, seqlen_k, D]``.

    Also bool ``[seqlen_k]``: the keys whose table entry names a page. The others hold 0.
    """
    num_pages, page_size = cache.shape[:2]
    keys = torch.arange(seqlen_k, device=cache.device)
    pages = table.long()[keys // page_size]
    exists = (pages >= 0) & (pages < num_pages)
    rows = torch.zeros(seqlen_k, *cache.shape[2:], dtype=cache.dtype, device=cache.device)
    rows[exists] = cache[pages[exists], keys[exists] % page_size]
    return rows.transpose(0, 1)[None], exists


def lengths_of(seq_lens: Tensor | None, batch: int, capacity: int) -> list[int]:
    """Tokens of each sequence, clamped to what the cache can hold; without seq_lens all of it."""
    if seq_lens is None:
        return [capacity] * batch
    return [min(max(n, 0), capacity) for n in seq_lens.tolist()]


def cached_rows(cache: Tensor, block_table: Tensor | None, b: int, length: int):
    """``[H, length, D]`` of sequence b, and bool ``[length]``: the rows that lie in a page."""
    if block_table is None:
        return cache[b, :, :length], torch.ones(length, dtype=torch.bool, device=cache.device)
    rows, exists = from_pages(cache, block_table[b], length)
    return rows[0], exists


def dequantized(cache: Tensor, scale: Tensor | None, head_dim: int) -> Tensor:
    if scale is None:
        return cache.double()
    shape = [1] * cache.dim()
    shape[head_dim] = -1
    return cache.double() * scale.double().view(shape)
