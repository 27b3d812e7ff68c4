"""How ``attnsieve.reference`` walks tiles: the sequential definition of threshold skipping."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attnsieve._reference_selection import Window, visible_mask
from attnsieve.index import BlockIndex

UNIT_KEYS = 64  # granularity of lists and skip tiles, in keys; block_k where that is smaller
GROUP_ROWS = 64  # query rows that share one threshold decision


def listed_blocks(index: BlockIndex, batch: int, head: int, num_heads: int, num_k_blocks: int):
    """For each row of the list that query head ``head`` reads: its valid ids, in list order."""
    list_batch = batch if index.counts.shape[0] > 1 else 0
    list_head = head // (num_heads // index.counts.shape[1])
    counts = index.counts[list_batch, list_head].clamp(0, index.capacity).tolist()
    columns = index.columns[list_batch, list_head].tolist()
    return [
        [block for block in row[:count] if 0 <= block < num_k_blocks]
        for row, count in zip(columns, counts, strict=True)
    ]


def scaled_scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """Scaled logits of one head in float64: ``[Sq, D] x [Sk, D] -> [Sq, Sk]``."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return q.double() @ k.double().T * scale


def lambda_table(threshold: float | Tensor, batch: int, num_heads: int) -> Tensor:
    """lambda of every sequence and query head, float64 ``[B, Hq]`` on the CPU."""
    values = torch.as_tensor(threshold).double().cpu()
    if values.dim() == 1 and values.shape[0] == batch == num_heads > 1:
        raise ValueError("threshold: one dimension could be the batch or the heads; give two")
    if values.dim() == 1 and values.shape[0] == batch:
        values = values[:, None]
    return values.expand(batch, num_heads)


def log_lambdas(threshold: float | Tensor | None, batch: int, num_heads: int) -> list[list[float]]:
    """ln(lambda) of every sequence and query head; -inf for 0, None and what is no threshold."""
    rows = lambda_table(0.0 if threshold is None else threshold, batch, num_heads).tolist()
    return [[math.log(x) if x > 0 else -math.inf for x in row] for row in rows]


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


def _hull(visible: Tensor, unit_keys: int) -> range:
    """The units that hold a key visible to one of the rows, ``visible [rows, Sk]``."""
    seen = torch.nonzero(visible.any(dim=0)).flatten().tolist()
    return range(seen[0] // unit_keys, seen[-1] // unit_keys + 1) if seen else range(0)


def _dense_tiles(units: range, skip_block: int) -> list[list[int]]:
    """The units that a group sees, in tiles aligned in key position, in visiting order."""
    per_tile = skip_block // UNIT_KEYS
    numbers = sorted({unit // per_tile for unit in units})
    tiles = [[unit for unit in units if unit // per_tile == n] for n in numbers]
    return tiles[-1:] + tiles[:-1]


def _listed_tiles(
    blocks: list[int], block_k: int, row_units: range, group_units: range, skip_block: int
) -> list[list[int]]:
    """The tiles of an index row that a group visits, in visiting order.

    The row's kept units, those that any of its query rows sees, are cut in list order; the last
    tile goes first. A group leaves out tiles, and units of tiles, of which it sees nothing.
    """
    unit_keys = min(block_k, UNIT_KEYS)
    width, per_tile = block_k // unit_keys, skip_block // unit_keys
    units = [block * width + i for block in blocks for i in range(width)]
    units = [unit for unit in units if unit in row_units]
    tiles = [units[i : i + per_tile] for i in range(0, len(units), per_tile)]
    seen = [[unit for unit in tile if unit in group_units] for tile in tiles[-1:] + tiles[:-1]]
    return [tile for tile in seen if tile]


@torch.no_grad()
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
    exists: Tensor | None = None,
) -> SkipWalk:
    """The sequential walk that defines threshold skipping, batched layout only.

    Each group of 64 query rows of one head visits the tiles that its rows can see, the last one
    first, then the others ascending; over an index, tiles are cut and ordered for the whole row of
    ``block_q`` query rows. A tile after the first is skipped iff ``m_tile - m_run <
    ln(threshold)`` for every row, where ``m_tile`` is the row's largest masked, scaled logit in the
    tile and ``m_run`` the largest one in the tiles attended before. A row that sees nothing in the
    tile never vetoes; NaN does. ``threshold`` is a number, ``[B]``, ``[Hq]`` or ``[B, Hq]``; 0 or
    None skips nothing. Keys that do not exist
    (``exists``, bool ``[Sk]``) are masked, but count for what a tile holds.
    """
    batch, num_heads, seqlen_q, _ = q.shape
    seqlen_k, group_size = k.shape[2], num_heads // k.shape[1] if num_heads else 1
    visible = visible_mask(seqlen_q, seqlen_k, causal=causal, window=window, device=q.device)
    attended = visible if exists is None else visible & exists
    unit_keys = UNIT_KEYS if index is None else min(index.block_k, UNIT_KEYS)
    times = torch.zeros(batch, num_heads, seqlen_q, seqlen_k, dtype=torch.int64, device=q.device)
    counters = torch.zeros(batch, num_heads, 2, dtype=torch.int64)
    margin = torch.full((batch, num_heads), math.inf, dtype=torch.float64)
    logs = log_lambdas(threshold, batch, num_heads)
    for b in range(batch):
        for h in range(num_heads):
            log_lambda = logs[b][h]
            scores = scaled_scores(q[b, h], k[b, h // group_size], softmax_scale)
            unit_max = _unit_max(scores.masked_fill(~attended, -math.inf), unit_keys)
            lists = None
            if index is not None:
                num_k_blocks = -(-seqlen_k // index.block_k)
                lists = listed_blocks(index, b, h, num_heads, num_k_blocks)
            for row0 in range(0, seqlen_q, GROUP_ROWS):
                rows = slice(row0, min(row0 + GROUP_ROWS, seqlen_q))
                group_units = _hull(visible[rows], unit_keys)
                if index is None:
                    tiles = _dense_tiles(group_units, skip_block)
                else:
                    row, block_q = row0 // index.block_q, index.block_q
                    blocks = lists[row] if row < len(lists) else []
                    row_units = _hull(visible[row * block_q : (row + 1) * block_q], unit_keys)
                    tiles = _listed_tiles(blocks, index.block_k, row_units, group_units, skip_block)
                unit_times = torch.zeros(unit_max.shape[1], dtype=torch.int64)
                row_max = None
                for tile in tiles:
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
                key_times = unit_times.repeat_interleave(unit_keys)[:seqlen_k].to(q.device)
                times[b, h, rows] = attended[rows] * key_times
    return SkipWalk(times, counters.to(q.device), margin.to(q.device))


def _unit_max(scores: Tensor, unit_keys: int) -> Tensor:
    """Largest logit per row and unit of keys, on the CPU, where the walk takes its decisions."""
    units = [unit.amax(dim=1) for unit in scores.split(unit_keys, dim=1) if unit.shape[1] > 0]
    return torch.stack(units, dim=1).cpu() if units else scores.cpu()
