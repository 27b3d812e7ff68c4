"""How ``attnsieve.reference`` chooses blocks: masks, pooled scores, selection rules."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnsieve.index import BlockIndex

Window = tuple[int, int] | None


def visible_mask(
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = False,
    window: Window = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """bool ``[seqlen_q, seqlen_k]``: the keys each query row may see.

    Both masks are aligned bottom-right: row i stands at key ``i + seqlen_k - seqlen_q``. A window
    ``(left, right)`` keeps keys from ``left`` before to ``right`` after that key, -1 = no limit;
    with ``causal`` the right side is 0.
    """
    diagonal = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_k - seqlen_q)
    keys = torch.arange(seqlen_k, device=device)[None, :]
    left, right = window if window is not None else (-1, -1)
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left >= 0:
        visible &= keys >= diagonal - left
    if causal:
        visible &= keys <= diagonal
    elif right >= 0:
        visible &= keys <= diagonal + right
    return visible


def pooled_block_scores(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int = 64,
    block_k: int = 64,
    softmax_scale: float | None = None,
) -> Tensor:
    """Oracle of ``attnsieve.pooled_block_scores``: float64 ``[B, Hq, nQ, nK]``.

    ``scale * mean(q block) . mean(k block)``; a ragged last block is averaged over its real rows.
    Masks are not applied.
    """

    def means(x: Tensor, block: int) -> Tensor:
        return torch.stack([rows.mean(dim=2) for rows in x.double().split(block, dim=2)], dim=2)

    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    k_means = means(k, block_k).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return means(q, block_q) @ k_means.transpose(-1, -2) * scale


def _forced_blocks(
    row: int,
    visible: list[int],
    seqlen_q: int,
    seqlen_k: int,
    block_q: int,
    block_k: int,
    sink_blocks: int,
    local_blocks: int,
    diagonal: bool,
) -> list[int]:
    """Blocks a row always keeps: the first ones, those of its own positions and those before."""
    forced = set(range(sink_blocks))
    offset = seqlen_k - seqlen_q
    positions = range(row * block_q + offset, min((row + 1) * block_q, seqlen_q) + offset)
    own = sorted({p // block_k for p in positions if 0 <= p < seqlen_k})
    if own:
        forced |= set(own) if diagonal else set()
        forced |= set(range(own[0] - local_blocks, own[0]))
    return [block for block in visible if block in forced]


def select_from_scores(
    scores: Tensor,
    seqlen_q: int,
    seqlen_k: int,
    *,
    topk: int | None = None,
    fraction: float | None = None,
    top_p: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    min_blocks: int = 1,
    sink_blocks: int = 1,
    local_blocks: int = 0,
    diagonal: bool = True,
    causal: bool = False,
    window: Window = None,
) -> BlockIndex:
    """Oracle of ``attnsieve.select_from_scores``: one Python loop over rows of block scores.

    A row ranks the blocks that hold a key visible to any of its query rows: forced ones first, then
    by descending score; equal scores by ascending id, NaN below -inf. It keeps

    * ``topk``: that many blocks;
    * ``fraction``: ``max(min_blocks, ceil(fraction * visible))`` blocks;
    * ``top_p``: the shortest prefix whose softmax mass over the visible blocks reaches ``top_p``,
      at least ``min_blocks`` (NaN scores have no mass);

    never more than are visible and never fewer than the forced ones. Give exactly one rule.
    ``columns`` has capacity nK, ascending ids, -1 after ``counts``.
    """
    if sum(rule is not None for rule in (topk, fraction, top_p)) != 1:
        raise ValueError("give exactly one of topk, fraction and top_p")
    batch, num_heads, num_rows, num_k_blocks = scores.shape
    pairs = visible_mask(seqlen_q, seqlen_k, causal=causal, window=window)
    shape = (batch, num_heads, num_rows)
    counts = torch.zeros(shape, dtype=torch.int32)
    columns = torch.full((*shape, num_k_blocks), -1, dtype=torch.int32)
    all_scores = scores.double().cpu()
    for row in range(num_rows):
        seen = pairs[row * block_q : (row + 1) * block_q].any(dim=0)
        visible = [c for c, keys in enumerate(seen.split(block_k)) if keys.any()]
        forced = _forced_blocks(
            row,
            visible,
            seqlen_q,
            seqlen_k,
            block_q,
            block_k,
            sink_blocks,
            local_blocks,
            diagonal,
        )
        for b in range(batch):
            for h in range(num_heads):
                s = all_scores[b, h, row].tolist()
                order = sorted(
                    visible,
                    key=lambda c: (
                        c not in forced,
                        math.isnan(s[c]),
                        -s[c] if s[c] == s[c] else 0,
                        c,
                    ),
                )
                if top_p is None:
                    budget = (
                        topk
                        if topk is not None
                        else max(min_blocks, math.ceil(fraction * len(visible)))
                    )
                else:
                    budget = _mass_budget(s, visible, order, top_p, min_blocks)
                kept = sorted(order[: max(budget, len(forced))])
                counts[b, h, row] = len(kept)
                columns[b, h, row, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
    return BlockIndex(counts.to(scores.device), columns.to(scores.device), block_q, block_k)


def _mass_budget(
    scores: list[float], visible: list[int], order: list[int], top_p: float, min_blocks: int
) -> int:
    """Length of the shortest prefix of ``order`` that holds ``top_p`` of the row's softmax mass."""
    top = max((scores[c] for c in visible if not math.isnan(scores[c])), default=-math.inf)
    if top == math.inf:  # the limit: infinite scores share the mass
        mass = {c: float(scores[c] == math.inf) for c in visible}
    else:
        mass = {c: math.exp(scores[c] - top) if scores[c] > -math.inf else 0.0 for c in visible}
    needed, reached = top_p * sum(mass.values()), 0.0
    for length, block in enumerate(order, start=1):
        reached += mass[block]
        if reached >= needed and length >= min_blocks:
            return length
    return len(order)


def select_blocks(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int = 64,
    block_k: int = 64,
    causal: bool = False,
    window: Window = None,
    softmax_scale: float | None = None,
    **rule,
) -> BlockIndex:
    """Oracle of ``attnsieve.select_blocks``: ``select_from_scores`` over ``pooled_block_scores``.

    ``rule`` are the other keyword arguments of ``select_from_scores``.
    """
    blocks = dict(block_q=block_q, block_k=block_k)
    scores = pooled_block_scores(q, k, softmax_scale=softmax_scale, **blocks)
    masks = dict(causal=causal, window=window)
    return select_from_scores(scores, q.shape[2], k.shape[2], **blocks, **masks, **rule)
