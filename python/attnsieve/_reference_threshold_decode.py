"""How ``attnsieve.reference`` skips tiles in decode: split by split, tile by tile."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnsieve._reference_attention import (
    cached_rows,
    dequantized,
    lengths_of,
    softmax_attention,
)
from attnsieve._reference_selection import visible_mask
from attnsieve._reference_threshold import SkipWalk, log_lambdas, scaled_scores
from attnsieve.ops_threshold import threshold_splits

GROUP_VECTORS = 16  # most heads x rows that decide together


def _capacity(cache: Tensor, block_table: Tensor | None) -> int:
    return cache.shape[2] if block_table is None else block_table.shape[1] * cache.shape[1]


def visiting_sequences(tiles: int, num_splits: int) -> list[list[int]]:
    """The tiles that each split visits: the last one, then the others ascending, dealt in turn."""
    order = [*range(tiles)][-1:] + [*range(tiles - 1)]
    return [order[split::num_splits] for split in range(num_splits)]


def _tile_maxima(scores: Tensor, skip_block: int) -> Tensor:
    """Largest logit of each row and tile, on the CPU: ``[..., T] -> [..., tiles]``."""
    tiles = [tile.amax(-1) for tile in scores.split(skip_block, -1) if tile.shape[-1] > 0]
    return torch.stack(tiles, -1).cpu() if tiles else scores.cpu()


def _excess(tile_max: Tensor, running: Tensor, log_lambda: Tensor) -> Tensor:
    """How far above its threshold each row is; +inf where it vetoes whatever the tile holds.

    A row that sees nothing in the tile is infinitely far below.
    """
    excess = torch.where(tile_max == -math.inf, -math.inf, tile_max - running - log_lambda)
    return torch.where((log_lambda == -math.inf) | excess.isnan(), math.inf, excess)


def _walk_split(maxima: Tensor, order: list[int], log_lambda: Tensor) -> tuple[list[int], float]:
    """The tiles that one split keeps of ``maxima [rows, tiles]``, and the margin."""
    running = torch.full(maxima.shape[:1], -math.inf, dtype=torch.float64)
    kept, margin = [], math.inf
    for tile in order:
        if kept:
            nearest = float(_excess(maxima[:, tile], running, log_lambda).max())
            margin = min(margin, abs(nearest))
            if nearest < 0:
                continue
        kept.append(tile)
        running = torch.maximum(running, maxima[:, tile])
    return kept, margin


def _walk_maxima(maxima: Tensor, log_lambda: Tensor) -> tuple[list[int], float]:
    """The same for two phases: every tile against the rows' maxima over all tiles."""
    kept, margin = [], math.inf
    peak = maxima.amax(-1) if maxima.shape[-1] > 0 else None
    for tile in range(maxima.shape[-1]):
        own = maxima[:, tile]
        if bool(((own == peak) & (own > -math.inf)).any()):
            kept.append(tile)
            continue
        nearest = float(_excess(own, peak, log_lambda.clamp(max=0.0)).max())
        margin = min(margin, abs(nearest))
        if not nearest < 0:
            kept.append(tile)
    return kept, margin


@torch.no_grad()
def threshold_decode_walk(
    q: Tensor,
    k: Tensor,
    threshold: float | Tensor | None,
    *,
    skip_block: int = 128,
    num_splits: int | None = None,
    two_phase: bool = False,
    causal: bool = False,
    softmax_scale: float | None = None,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    k_scale: Tensor | None = None,
) -> SkipWalk:
    """The decisions of ``threshold_attention(phase="decode")``; arguments as there.

    ``times`` is int64 ``[B, Hq, Sq, capacity]``. ``threshold`` None skips nothing.
    """
    batch, num_heads, rows, _ = q.shape
    num_kv_heads = k.shape[1 if block_table is None else 2]
    capacity, shared = _capacity(k, block_table), num_heads // num_kv_heads
    group = shared if two_phase else min(shared, GROUP_VECTORS // max(rows, 1))
    if num_splits is None:
        num_groups = batch * num_kv_heads * -(-shared // group)
        num_splits = threshold_splits(num_groups, capacity, skip_block)
    logs = log_lambdas(threshold, batch, num_heads)
    keys = dequantized(k, k_scale, 1 if block_table is None else 2)
    times = torch.zeros(batch, num_heads, rows, capacity, dtype=torch.int64)
    counters = torch.zeros(batch, num_heads, 2, dtype=torch.int64)
    margin = torch.full((batch, num_heads), math.inf, dtype=torch.float64)
    for b, length in enumerate(lengths_of(seq_lens, batch, capacity) if rows > 0 else ()):
        own, exists = cached_rows(keys, block_table, b, length)
        seen = visible_mask(rows, length, causal=causal, device=q.device) & exists
        for first in range(0, num_heads, shared):
            for h0 in range(first, first + shared, group):
                heads = range(h0, min(h0 + group, first + shared))
                logits = [scaled_scores(q[b, h], own[h // shared], softmax_scale) for h in heads]
                maxima = _tile_maxima(
                    torch.cat(logits).masked_fill(~seen.repeat(len(heads), 1), -math.inf),
                    skip_block,
                )
                log_lambda = torch.tensor([logs[b][h] for h in heads], dtype=torch.float64)
                log_lambda = log_lambda.repeat_interleave(rows)
                tiles = -(-length // skip_block)
                if two_phase:
                    walks = [_walk_maxima(maxima, log_lambda)]
                else:
                    sequences = visiting_sequences(tiles, num_splits)
                    walks = [_walk_split(maxima, order, log_lambda) for order in sequences]
                kept = [tile for tiles_of_split, _ in walks for tile in tiles_of_split]
                for h in heads:
                    counters[b, h] = torch.tensor([tiles - len(kept), tiles])
                    margin[b, h] = min(nearest for _, nearest in walks)
                    for tile in kept:
                        keys_of_tile = slice(
                            tile * skip_block, min((tile + 1) * skip_block, length)
                        )
                        times[b, h, :, keys_of_tile] = seen[:, keys_of_tile].long().cpu()
    return SkipWalk(times.to(q.device), counters.to(q.device), margin.to(q.device))


def attend_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    times: Tensor,
    *,
    softmax_scale: float | None,
    sink: Tensor | None,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) over the pairs of ``times [B, Hq, Sq, capacity]``, masks included."""
    batch, num_heads, rows, _ = q.shape
    head_axis = 1 if block_table is None else 2
    shared = num_heads // k.shape[head_axis]
    keys, values = dequantized(k, k_scale, head_axis), dequantized(v, v_scale, head_axis)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64, device=q.device)
    lse = torch.zeros(batch, num_heads, rows, dtype=torch.float64, device=q.device)
    for b, length in enumerate(lengths_of(seq_lens, batch, _capacity(k, block_table))):
        own_k, _ = cached_rows(keys, block_table, b, length)
        own_v, _ = cached_rows(values, block_table, b, length)
        for h in range(num_heads):
            scores = scaled_scores(q[b, h], own_k[h // shared], softmax_scale)
            pairs, head_sink = times[b, h, :, :length], None if sink is None else sink[h]
            out[b, h], lse[b, h] = softmax_attention(scores, own_v[h // shared], pairs, head_sink)
    return out, lse
