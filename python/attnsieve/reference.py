"""float64 oracles of the public functions: the same names and arguments, plain and slow.

Inputs of any dtype are upcast to float64 on their device; results stay float64. Each oracle states
its function's definition in the most direct way, by token masks and Python loops, and shares
nothing with the kernels. Use them to test a kernel, or to read what a function means.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attnsieve._reference_selection import (
    Window,
    pooled_block_scores,
    select_blocks,
    select_from_scores,
    visible_mask,
)
from attnsieve.index import BlockIndex

__all__ = [
    "SkipWalk",
    "block_sparse_attention",
    "index_multiplicity",
    "merge_states",
    "pooled_block_scores",
    "select_blocks",
    "select_from_scores",
    "threshold_attention",
    "threshold_walk",
    "visible_mask",
]

UNIT_KEYS = 64  # granularity of lists and skip tiles, in keys
GROUP_ROWS = 64  # query rows that share one threshold decision


def _listed_blocks(index: BlockIndex, batch: int, head: int, num_heads: int, num_k_blocks: int):
    """For each row of the list that query head ``head`` reads: its valid ids, in list order."""
    list_batch = batch if index.counts.shape[0] > 1 else 0
    list_head = head // (num_heads // index.counts.shape[1])
    counts = index.counts[list_batch, list_head].clamp(0, index.capacity).tolist()
    columns = index.columns[list_batch, list_head].tolist()
    return [
        [block for block in row[:count] if 0 <= block < num_k_blocks]
        for row, count in zip(columns, counts, strict=True)
    ]


def index_multiplicity(
    index: BlockIndex | None, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int
) -> Tensor:
    """int64 ``[batch, num_heads, seqlen_q, seqlen_k]``: how often the index lists each pair.

    1 everywhere without an index; above 1 only where a row repeats a block. Masks are not applied.
    """
    if index is None:
        return torch.ones(batch, num_heads, seqlen_q, seqlen_k, dtype=torch.int64)
    device, bq, bk = index.device, index.block_q, index.block_k
    times = torch.zeros(batch, num_heads, seqlen_q, seqlen_k, dtype=torch.int64, device=device)
    for b in range(batch):
        for h in range(num_heads):
            lists = _listed_blocks(index, b, h, num_heads, -(-seqlen_k // bk))
            for row, blocks in enumerate(lists):
                for block in blocks:
                    times[b, h, row * bq : (row + 1) * bq, block * bk : (block + 1) * bk] += 1
    return times


def _scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """Scaled logits of one head in float64: ``[Sq, D] x [Sk, D] -> [Sq, Sk]``."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return q.double() @ k.double().T * scale


def _softmax_attention(
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
    shift = row_max.masked_fill(row_max == -math.inf, 0.0)
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
    out = torch.where(row_sum[:, None] == 0, 0.0, out / row_sum[:, None])
    return out, torch.log(row_sum) + shift


def _attend(q, k, v, times, softmax_scale, sink) -> tuple[Tensor, Tensor]:
    """Batched problem with pair multiplicities ``times [B, Hq, Sq, Sk]``, masks included."""
    batch, num_heads, seqlen_q, head_dim = q.shape
    group_size = num_heads // k.shape[1] if num_heads else 1
    out = torch.zeros(batch, num_heads, seqlen_q, head_dim, dtype=torch.float64, device=q.device)
    lse = torch.zeros(batch, num_heads, seqlen_q, dtype=torch.float64, device=q.device)
    for b in range(batch):
        for h in range(num_heads):
            kv_head = h // group_size
            scores = _scores(q[b, h], k[b, kv_head], softmax_scale)
            head_sink = None if sink is None else sink[h]
            out[b, h], lse[b, h] = _softmax_attention(scores, v[b, kv_head], times[b, h], head_sink)
    return out, lse


def _per_sequence(attend_one, q, k, v, index, cu_seqlens_q, cu_seqlens_k):
    """Runs ``attend_one(b, q, k, v, index)`` on each sequence of a varlen problem."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64, device=q.device)
    extras = []
    for b in range(len(starts_q) - 1):
        rows = slice(starts_q[b], starts_q[b + 1])
        keys = slice(starts_k[b], starts_k[b + 1])
        sequence = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
        own_index = index
        if index is not None and index.counts.shape[0] > 1:
            counts, columns = index.counts[b : b + 1], index.columns[b : b + 1]
            own_index = BlockIndex(counts, columns, index.block_q, index.block_k)
        one_out, one_lse, extra = attend_one(b, *sequence, own_index)
        out[rows], lse[rows] = one_out[0].transpose(0, 1), one_lse[0].transpose(0, 1)
        extras.append(extra)
    return out, lse, extras


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex | None = None,
    *,
    causal: bool = False,
    window: Window = None,
    softmax_scale: float | None = None,
    sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    validate: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Oracle of ``attnsieve.block_sparse_attention``: dense attention with a token mask.

    Shapes as there. Returns ``out`` (float64, q's shape) or ``(out, lse)``.
    """
    result = threshold_attention(
        q,
        k,
        v,
        None,
        index=index,
        causal=causal,
        window=window,
        softmax_scale=softmax_scale,
        sink=sink,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        validate=validate,
        return_lse=True,
    )
    return result if return_lse else result[0]


class SkipWalk(NamedTuple):
    """What threshold skipping decided.

    Attributes:
        times: int64 ``[B, Hq, Sq, Sk]``; how often each pair is attended, masks included.
        counters: int64 ``[B, Hq, 2]``; (skipped, total) tiles.
        margin: float64 ``[B, Hq]``; the least distance of a decision from ln(threshold), in logits.
            A kernel that rounds differently may decide otherwise only where this is tiny.
    """

    times: Tensor
    counters: Tensor
    margin: Tensor


def _tiles(units: list[int], skip_block: int, indexed: bool) -> list[list[int]]:
    """Cuts a group's visible units into voted tiles, in visiting order: the last tile first."""
    per_tile = skip_block // UNIT_KEYS
    if indexed:
        tiles = [units[i : i + per_tile] for i in range(0, len(units), per_tile)]
    else:
        numbers = sorted({unit // per_tile for unit in units})
        tiles = [[unit for unit in units if unit // per_tile == n] for n in numbers]
    return tiles[-1:] + tiles[:-1]


def threshold_walk(
    q: Tensor,
    k: Tensor,
    threshold: float | Tensor | None,
    *,
    index: BlockIndex | None = None,
    skip_block: int = 128,
    causal: bool = False,
    window: Window = None,
    softmax_scale: float | None = None,
) -> SkipWalk:
    """The sequential walk that defines threshold skipping, batched layout only.

    Each group of 64 query rows of one head visits the tiles that its rows can see, the last one
    first, then the others ascending. A tile after the first is skipped iff ``m_tile - m_run <
    ln(threshold)`` for every row, where ``m_tile`` is the row's largest masked, scaled logit in the
    tile and ``m_run`` the largest one in the tiles attended before. A row that sees nothing in the
    tile never vetoes; NaN does. ``threshold`` 0 or None skips nothing.
    """
    batch, num_heads, seqlen_q, _ = q.shape
    seqlen_k, group_size = k.shape[2], num_heads // k.shape[1] if num_heads else 1
    visible = visible_mask(seqlen_q, seqlen_k, causal=causal, window=window, device=q.device)
    times = torch.zeros(batch, num_heads, seqlen_q, seqlen_k, dtype=torch.int64, device=q.device)
    counters = torch.zeros(batch, num_heads, 2, dtype=torch.int64)
    margin = torch.full((batch, num_heads), math.inf, dtype=torch.float64)
    lambdas = torch.zeros(()) if threshold is None else torch.as_tensor(threshold).double().cpu()
    lambdas = lambdas.expand(batch).tolist()
    for b in range(batch):
        log_lambda = math.log(lambdas[b]) if lambdas[b] > 0 else -math.inf
        for h in range(num_heads):
            scores = _scores(q[b, h], k[b, h // group_size], softmax_scale)
            unit_max = _unit_max(scores.masked_fill(~visible, -math.inf))
            lists = None
            if index is not None:
                num_k_blocks = -(-seqlen_k // index.block_k)
                lists = _listed_blocks(index, b, h, num_heads, num_k_blocks)
            for row0 in range(0, seqlen_q, GROUP_ROWS):
                rows = slice(row0, min(row0 + GROUP_ROWS, seqlen_q))
                seen_keys = torch.nonzero(visible[rows].any(dim=0)).flatten().tolist()
                if not seen_keys:
                    continue
                seen_units = range(seen_keys[0] // UNIT_KEYS, seen_keys[-1] // UNIT_KEYS + 1)
                units = list(seen_units)
                if index is not None:
                    row, width = row0 // index.block_q, index.block_k // UNIT_KEYS
                    blocks = lists[row] if row < len(lists) else []
                    units = [block * width + i for block in blocks for i in range(width)]
                    units = [unit for unit in units if unit in seen_units]
                unit_times = torch.zeros(unit_max.shape[1], dtype=torch.int64)
                row_max = None
                for tile in _tiles(units, skip_block, index is not None):
                    counters[b, h, 1] += 1
                    tile_max = unit_max[rows, tile].amax(dim=1)
                    if row_max is not None and log_lambda > -math.inf:
                        rise = torch.where(tile_max == -math.inf, -math.inf, tile_max - row_max)
                        distance = (rise.max() - log_lambda).abs().nan_to_num(math.inf)
                        margin[b, h] = torch.minimum(margin[b, h], distance)
                        if (rise < log_lambda).all():
                            counters[b, h, 0] += 1
                            continue
                    row_max = tile_max if row_max is None else torch.maximum(row_max, tile_max)
                    for unit in tile:
                        unit_times[unit] += 1
                key_times = unit_times.repeat_interleave(UNIT_KEYS)[:seqlen_k].to(q.device)
                times[b, h, rows] = visible[rows] * key_times
    return SkipWalk(times, counters.to(q.device), margin.to(q.device))


def _unit_max(scores: Tensor) -> Tensor:
    """Largest logit per row and unit of 64 keys, on the CPU, where the walk takes its decisions."""
    units = [unit.amax(dim=1) for unit in scores.split(UNIT_KEYS, dim=1) if unit.shape[1] > 0]
    return torch.stack(units, dim=1).cpu() if units else scores.cpu()


def threshold_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    threshold: float | Tensor | None,
    *,
    index: BlockIndex | None = None,
    skip_block: int = 128,
    causal: bool = False,
    window: Window = None,
    softmax_scale: float | None = None,
    sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    validate: bool = False,
    return_lse: bool = False,
    return_counters: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Oracle of ``attnsieve.threshold_attention``: attention over ``threshold_walk``'s pairs.

    Shapes as there. Returns ``out`` (float64), or a tuple ``(out[, lse][, counters])``.
    """
    lambdas = None if threshold is None else torch.as_tensor(threshold).double()

    def attend_one(b, q, k, v, index):
        if validate and index is not None:
            index.validate(-(-k.shape[2] // index.block_k))
        own = lambdas if lambdas is None or lambdas.dim() == 0 or b is None else lambdas[b]
        masks = dict(causal=causal, window=window)
        if lambdas is None:
            times = index_multiplicity(index, q.shape[0], q.shape[1], q.shape[2], k.shape[2])
            times = times.to(q.device) * visible_mask(
                q.shape[2], k.shape[2], device=q.device, **masks
            )
            counters = torch.zeros(*q.shape[:2], 2, dtype=torch.int64, device=q.device)
        else:
            times, counters, _ = threshold_walk(
                q, k, own, index=index, skip_block=skip_block, softmax_scale=softmax_scale, **masks
            )
        return *_attend(q, k, v, times, softmax_scale, sink), counters

    if cu_seqlens_q is None:
        out, lse, counters = attend_one(None, q, k, v, index)
    else:
        out, lse, counters = _per_sequence(attend_one, q, k, v, index, cu_seqlens_q, cu_seqlens_k)
        counters = torch.cat(counters)
    results = (out,) + (lse,) * return_lse + (counters,) * return_counters
    return results if len(results) > 1 else out


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Oracle of ``attnsieve.merge_states``: ``outs [N, ..., D]``, ``lses [N, ...]``, natural log.

    ``out = sum_n softmax_n(lse) * outs[n]``, ``lse = logsumexp_n``; a state with lse = -inf holds
    nothing and counts for nothing, and if all do, out = 0 and lse = -inf.
    """
    outs, lses = outs.double(), lses.double()
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.where(lses == -math.inf, 0.0, torch.exp(lses - lse)).unsqueeze(-1)
    return torch.where(weights == 0, 0.0, weights * outs).sum(dim=0), lse
