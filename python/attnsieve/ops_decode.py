"""The public functions of the decode family: attention over a KV cache, and what it reads of it.

Letters as in :mod:`attnsieve.ops`; ``N`` scored candidates, ``Hidx`` lists per sequence. The
float64 oracles are in :mod:`attnsieve.reference_decode`, with the same names and arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnsieve._arguments import call_op, check_decode_values, default_scale, require_tensor
from attnsieve.token_index import TokenIndex

__all__ = ["decode", "select_threshold", "select_topk"]


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    index: TokenIndex | None = None,
    *,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    dense_begin: Tensor | None = None,
    recent: int = 0,
    sink: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    num_splits: int = 0,
    validate: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention of 1 to 8 new query rows per sequence over what ``index`` lists.

    Args:
        q: ``[B, Hq, Sq, D]``, float16 or bfloat16, float32 on CPU too. The new rows' own keys are
            in the cache: row i sees keys ``j <= i + T - Sq`` of its sequence's T.
        k_cache, v_cache: dtype of q, or float8_e4m3fn codes; contiguous ``[B, Hkv, S, D]``, or with
            ``block_table`` pages ``[num_pages, page_size, Hkv, D]`` of any page_size.
        index: tokens or pages to attend to; None is everything. Its list heads are Hq, Hkv or 1.
            Keys beyond T or the row's causal limit are skipped.
        block_table: int32 ``[B, max_pages]``: key j is row ``j % page_size`` of page
            ``block_table[b, j // page_size]``. Keys behind an entry outside ``[0, num_pages)`` are
            masked.
        seq_lens: int32 ``[B]``, T of each sequence, clamped to ``[0, capacity]``. Needed with
            ``block_table``; without, the default is all of a contiguous cache.
        dense_begin, recent: with an index, int32 ``[B]`` and a number: keys from
            ``min(dense_begin[b], T - recent)`` on are attended besides the list. What the list says
            there is dropped, so each key counts once.
        sink: float32 ``[Hq]``: one more logit per row that has no value. Not scaled.
        k_scale, v_scale: float32 ``[Hkv]``, needed with codes: k is ``code * k_scale``, v alike.
        softmax_scale: positive; default ``1 / sqrt(D)``.
        causal: False lets every new row see all T keys.
        num_splits: on CUDA a list, or a sequence, is attended in parts that are merged in their
            order; at most so many, up to 128. 0 lets the library choose, from shapes alone. The CPU
            takes each list in one piece.
        validate: check lengths, pages and ``index`` on the host first (synchronises).
        return_lse: also return the log-sum-exp.

    Returns:
        ``out`` like q, or ``(out, lse)`` with ``lse`` float32 ``[B, Hq, Sq]``: natural logarithm,
        sink included. A row with nothing to attend to gives 0 and -inf (with a sink: 0 and the
        sink).

    Raises:
        ValueError: malformed argument, named in the text; with ``validate`` also a bad value.
        NotImplementedError: no kernel for the device, dtype or head dim; or gradients are asked
            for: there is no backward yet.
    """
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        require_tensor(name, tensor)
    if index is not None and not isinstance(index, TokenIndex):
        raise TypeError(f"index: expected a TokenIndex or None, got {type(index).__name__}")
    if validate:
        check_decode_values(k_cache, index, block_table, seq_lens)
    out, lse = call_op(
        torch.ops.attnsieve.decode.default,
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        None if index is None else index.indices,
        None if index is None else index.counts,
        1 if index is None else index.page_size,
        False if index is None else index.physical,
        dense_begin,
        recent,
        sink,
        k_scale,
        v_scale,
        default_scale(q, softmax_scale),
        causal,
        num_splits,
    )
    return (out, lse) if return_lse else out


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
        k: entries per list, any number. Lists have room for k even where N is smaller.
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
    require_tensor("scores", scores)
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
    require_tensor("scores", scores)
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
