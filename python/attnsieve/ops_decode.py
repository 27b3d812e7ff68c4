"""The public functions of the decode family: choosing tokens or pages of the KV cache.

Letters as in :mod:`attnsieve.ops`; ``N`` scored candidates, ``Hidx`` lists per sequence. The
float64 oracles are in :mod:`attnsieve.reference_decode`, with the same names and arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnsieve._arguments import call_op
from attnsieve.token_index import TokenIndex

__all__ = ["select_threshold", "select_topk"]


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


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
    """Keeps the k best tokens or pages of every list of scores, on device and exactly.

    Ranking is by score, descending; ties go to the smaller position, NaN ranks below -inf. Every
    candidate may be kept, whatever its score: only ``seq_lens`` removes candidates.

    Args:
        scores: float32 ``[B, Hidx, N]``, or ``[B, Sq, Hidx, N]`` for a list per new query row; last
            dimension contiguous.
        k: entries per list, any number on the CPU. Lists have room for k even where N is smaller.
        seq_lens: int32 ``[B]``, keys of each sequence, the new rows' included: the first
            ``ceil(keys / page_size)`` scores are candidates, clamped to ``[0, N]``. All N without.
        page_size: keys that one score stands for: 1 for tokens.
        sink, recent: the first and the last candidates of a list are kept whatever their scores,
            inside the budget; ``sink + recent <= k``.
        causal: row i of Sq sees ``seq_lens - Sq + 1 + i`` keys; needs 4-d scores.
        block_table: int32 ``[B, max_pages]`` of a cache of ``num_pages`` pages of
            ``table_page_size`` tokens. Entries become slots ``page * table_page_size + row``; page
            ids where ``page_size == table_page_size > 1``; -1 where the table names no page. Their
            order stays that of the positions, ``counts`` include every -1 so placed.

    Returns:
        :class:`TokenIndex` with ``counts = min(k, candidates)`` entries per list, ascending by
        position, -1 behind them; ``physical`` where a ``block_table`` was given.

    Raises:
        ValueError: malformed argument, named in the text.
        NotImplementedError: no kernel for the device.

    Follows the selection of DSA, Quest and FlashInfer's ``top_k_page_table_transform``.
    """
    _require_tensor("scores", scores)
    indices, counts = call_op(
        torch.ops.attnsieve.select_topk.default,
        scores,
        seq_lens,
        k,
        page_size,
        sink,
        recent,
        causal,
        block_table,
        table_page_size,
        num_pages,
    )
    return TokenIndex(indices, counts, page_size, block_table is not None)


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
    """Keeps the tokens or pages that score strictly above ``threshold`` (Squeezed Attention).

    Args:
        threshold: a number (rounded to float32) or float32 ``[B]`` or ``[B, Hidx]``. NaN scores
            never pass; nothing passes a NaN threshold.
        capacity: entries per list. Where more pass, the best of them are kept, in the order of
            :func:`select_topk`.

    Other arguments and errors as :func:`select_topk`; forced entries need not pass.

    Returns:
        ``(index, passed)``: ``passed`` int32 like ``index.counts`` is how many passed or were
        forced; above ``capacity`` it shows that the list was cut.
    """
    _require_tensor("scores", scores)
    value, per_head = None, None
    if isinstance(threshold, Tensor):
        if threshold.dim() > 2:
            raise ValueError(
                "threshold: expected a number, [batch] or [batch, lists], got shape "
                f"{list(threshold.shape)}"
            )
        shape = scores.shape[0], scores.shape[-2]
        per_head = threshold.unsqueeze(-1) if threshold.dim() == 1 else threshold
        per_head = per_head.expand(shape)
    elif isinstance(threshold, int | float):
        value = float(threshold)
    else:
        raise TypeError(f"threshold: expected a number or a tensor, got {type(threshold).__name__}")
    indices, counts, passed = call_op(
        torch.ops.attnsieve.select_threshold.default,
        scores,
        seq_lens,
        value,
        per_head,
        capacity,
        page_size,
        sink,
        recent,
        causal,
        block_table,
        table_page_size,
        num_pages,
    )
    return TokenIndex(indices, counts, page_size, block_table is not None), passed
