"""How ``attnsieve.reference_decode`` chooses tokens or pages: one Python loop over lists."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnsieve.token_index import TokenIndex


def _candidates(seq_lens, b, row, num_rows, causal, page_size, columns) -> int:
    """How many of the scores of a list belong to keys that its row may see."""
    if seq_lens is None:
        return columns
    length = int(seq_lens[b]) - (num_rows - 1 - row if causal else 0)
    return min(max(-(-length // page_size), 0), columns)


def _ranked(scores: list[float], count: int, sink: int, recent: int) -> list[int]:
    """Candidates from best to worst; the forced ones come first."""

    def key(j: int):
        forced = j < sink or j >= count - recent
        nan = math.isnan(scores[j])
        return not forced, nan and not forced, 0 if nan or forced else -scores[j], j

    return sorted(range(count), key=key)


def _physical(j: int, page_size: int, table: list[int], table_page_size: int, pages: int) -> int:
    """Slot of token j, or id of page j; -1 where the table names no page."""
    slot = j if page_size > 1 else j // table_page_size
    page = table[slot] if slot < len(table) else -1
    if not 0 <= page < pages:
        return -1
    return page if page_size > 1 else page * table_page_size + j % table_page_size


def _select(keep, scores, capacity, seq_lens, page_size, sink, recent, causal, where):
    """Runs ``keep(b, h, scores, ranked, forced) -> (kept best first, passed)`` on every list."""
    block_table, table_page_size, num_pages = where
    if sink < 0 or recent < 0 or sink + recent > capacity:
        raise ValueError(
            f"sink, recent: {sink} + {recent} forced entries do not fit in a budget of {capacity}"
        )
    if block_table is not None and page_size not in (1, table_page_size):
        raise ValueError(f"page_size: expected 1 or {table_page_size}, got {page_size}")
    rows = scores if scores.dim() == 4 else scores.unsqueeze(1)
    batch, num_rows, num_lists, columns = rows.shape
    if causal and scores.dim() != 4:
        raise ValueError("causal: expected scores [B, Sq, H, N], a list for every row")
    indices = torch.full((batch, num_rows, num_lists, capacity), -1, dtype=torch.int32)
    counts = torch.zeros(batch, num_rows, num_lists, dtype=torch.int32)
    passed = torch.zeros_like(counts)
    for b in range(batch):
        table = None if block_table is None else block_table[b].tolist()
        for row in range(num_rows):
            count = _candidates(seq_lens, b, row, num_rows, causal, page_size, columns)
            forced = min(sink + recent, count)
            for h in range(num_lists):
                values = rows[b, row, h].tolist()
                ranked = _ranked(values, count, sink, recent)
                kept, passed[b, row, h] = keep(b, h, values, ranked, forced)
                kept = sorted(kept[:capacity])
                if table is not None:
                    kept = [
                        _physical(j, page_size, table, table_page_size, num_pages) for j in kept
                    ]
                counts[b, row, h] = len(kept)
                indices[b, row, h, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
    if scores.dim() == 3:
        indices, counts, passed = indices[:, 0], counts[:, 0], passed[:, 0]
    indices, counts, passed = (x.to(scores.device) for x in (indices, counts, passed))
    return TokenIndex(indices, counts, page_size, block_table is not None), passed


def select_topk(
    scores: Tensor,
    k: int,
    *,
    seq_lens: Tensor | None = None,
    page_size: int = 1,
    sink: int = 0,
    recent: int = 0,
    causal: bool = False,
    block_table: Tensor | None = None,
    table_page_size: int = 1,
    num_pages: int = 0,
) -> TokenIndex:
    """Oracle of ``select_topk``: the k best of every list of token or page scores.

    Args:
        scores: ``[B, H, N]``, or ``[B, Sq, H, N]`` for a list per new row.
        seq_lens: int32 ``[B]``, cached keys; the first ``ceil(keys / page_size)`` scores are
            candidates, all N without it. With ``causal`` row i sees ``seq_lens - Sq + 1 + i`` keys.
        page_size: keys that a score stands for.
        sink, recent: the first and last candidates of a list are kept whatever their scores, inside
            the budget.
        block_table: entries become slots (pages: page ids) of a cache of ``num_pages`` pages of
            ``table_page_size`` tokens; -1 where the table names no page.

    Returns:
        TokenIndex with ``min(k, candidates)`` entries a list, ascending by position, -1 behind.
        Ranking is by descending score; ties go to the smaller position, NaN is below -inf.
    """

    def keep(b, h, values, ranked, forced):
        return ranked[:k], len(ranked)

    where = block_table, table_page_size, num_pages
    return _select(keep, scores, k, seq_lens, page_size, sink, recent, causal, where)[0]


def select_threshold(
    scores: Tensor,
    threshold: float | Tensor,
    capacity: int,
    *,
    seq_lens: Tensor | None = None,
    page_size: int = 1,
    sink: int = 0,
    recent: int = 0,
    causal: bool = False,
    block_table: Tensor | None = None,
    table_page_size: int = 1,
    num_pages: int = 0,
) -> tuple[TokenIndex, Tensor]:
    """Oracle of ``select_threshold``: what scores strictly above ``threshold``, and the forced.

    ``threshold`` is a number (rounded to float32), ``[B]`` or ``[B, H]``. Where more than
    ``capacity`` pass, the best of them in the order of :func:`select_topk`. Other arguments as
    there.

    Returns:
        ``(index, passed)``; ``passed`` int32 like ``index.counts``, how many passed before the cut.
    """
    limits = torch.as_tensor(threshold, dtype=torch.float32)  # as the scores are

    def keep(b, h, values, ranked, forced):
        limit = limits
        if limits.dim() > 0:
            limit = limits[b] if limits.dim() == 1 else limits[b, h]
        kept = [j for i, j in enumerate(ranked) if i < forced or values[j] > float(limit)]
        return kept, len(kept)

    where = block_table, table_page_size, num_pages
    return _select(keep, scores, capacity, seq_lens, page_size, sink, recent, causal, where)
