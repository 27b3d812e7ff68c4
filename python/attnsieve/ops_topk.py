"""The top-k family in one call: score what is cached, keep the k best, attend to them exactly.

Letters as in :mod:`attnsieve.ops_decode`; ``P`` tokens of a cache page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnsieve._arguments import (
    check_decode_values,
    check_head_scale,
    key_scale_of,
    require_tensor,
)
from attnsieve.ops_cache import proxy_scores
from attnsieve.ops_decode import decode, select_topk
from attnsieve.token_index import TokenIndex

__all__ = ["topk_attention"]


def topk_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k: int = 2048,
    score: str | Tensor = "quest",
    bounds: Tensor | None = None,
    page_size: int | None = None,
    num_lists: int | None = None,
    head_reduce: str | None = None,
    row_reduce: str | None = None,
    score_softmax: bool = False,
    score_scale: float | None = None,
    sink_tokens: int = 0,
    recent_tokens: int = 1,
    reuse: TokenIndex | None = None,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    sink: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    validate: bool = False,
    return_index: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor | TokenIndex, ...]:
    """Attention of 1 to 8 new query rows per sequence over the k cached keys that score best.

    :func:`proxy_scores`, :func:`select_topk` and :func:`decode`, and no other work on the device
    (where Sq > 1 has no ``seq_lens``, one fill more). Nothing synchronises and no shape depends on
    values: a step can be captured into a CUDA graph and replayed with other lengths, tables and
    contents.

    Args:
        q: ``[B, Hq, Sq, D]``. The new rows' own keys are in the cache: row i sees keys
            ``j <= i + T - Sq`` of its sequence's T.
        k_cache, v_cache: contiguous ``[B, Hkv, S, D]``, or with ``block_table`` pages
            ``[num_pages, P, Hkv, D]``; dtype of q, or float8_e4m3fn codes.
        k: keys of a list, a multiple of ``page_size``. A sequence of at most k keys is attended to
            completely, so are pages that hold them.
        score: "quest": an upper bound of ``q.k`` over each page, from ``bounds``. "exact": ``q.k``
            of every cached key, of a page its largest. Or a tensor of the caller's scores, float32
            ``[B, Hidx, N]``, or ``[B, Sq, Hidx, N]`` for a list per row, Hidx 1, Hkv or Hq: of N
            tokens, or with ``page_size`` pages. Keys past the N scored ones are never selected.
        bounds: with "quest": ``[num_pages, Hkv, 2, D]``, contiguous
            ``[B, ceil(S / page_size), Hkv, 2, D]``, minimum and maximum of the keys of each page,
            as :func:`append_kv` keeps them: of a float8 cache those of the codes. Dtype of q.
        page_size: tokens of a selected page; 1 selects single tokens. Default 1. With "quest" it is
            the page size of ``bounds``: P, the default, or needed where the cache is contiguous.
        num_lists: how many lists per sequence: Hq, Hkv (default) or 1. Shared lists let the query
            heads of a KV head read each row once; Hq is what Quest and TidalDecode define.
        head_reduce: "max" (default), "mean" or "sum" over the query heads that share a list.
        row_reduce: "max", "mean" or "sum" makes one list for all Sq rows. Default None: every row
            selects among the keys it sees, as a call of its own at its length would.
        score_softmax: after ``row_reduce`` each head's scores become its softmax over the keys it
            sees, so that the heads of a list have equal votes (TokenSelect).
        score_scale: scale of the scores, positive; default ``1 / sqrt(D)``. Only ``score_softmax``
            makes a choice depend on it.
        sink_tokens, recent_tokens: at least so many first and last keys of each row are kept,
            whatever their scores, inside k; pages that hold one of them are kept whole.
        reuse: an index of an earlier layer or step. Nothing is scored or selected, the arguments
            above from ``k`` on are not looked at.
        block_table: int32 ``[B, max_pages]``, pages of each sequence, as in :func:`decode`.
        seq_lens: int32 ``[B]``, T of each sequence, clamped to the capacity. Needed with
            ``block_table``; without, the default is all of a contiguous cache.
        sink: float32 ``[Hq]``: one more attention logit per row that has no value. Not scaled.
        k_scale, v_scale: float32 ``[Hkv]``, needed with codes: k is ``code * k_scale``, v alike.
            "quest" and "exact" score the keys so scaled.
        softmax_scale: of the attention; positive, default ``1 / sqrt(D)``.
        causal: False lets every new row see all T keys.
        validate: check lengths, pages and ``reuse`` on the host first (synchronises).
        return_index, return_lse: also return what was attended to, and the log-sum-exp.

    Returns:
        ``out`` like q, then as asked for ``index``, ready to be passed as ``reuse``, and ``lse``
        float32 ``[B, Hq, Sq]``. ``index`` is a :class:`TokenIndex` of tokens, or of pages of
        ``page_size``, with a list per row where Sq > 1 and no ``row_reduce`` joins them. An empty
        sequence gives 0 and -inf.

    Raises:
        TypeError, ValueError: malformed argument, named in the text; with ``validate`` also a bad
            value.
        NotImplementedError: no kernel for the device, dtype or head dim; or gradients are asked
            for: there is no backward yet.

    "quest" follows Quest (Tang et al., ICML 2024, arXiv 2406.10774), there with a list per query
    head; caller's scores serve learned indexers such as DeepSeek Sparse Attention's.
    """
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        require_tensor(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions, got shape {list(tensor.shape)}")
    if reuse is not None and not isinstance(reuse, TokenIndex):
        raise TypeError(f"reuse: expected a TokenIndex or None, got {type(reuse).__name__}")
    num_kv_heads = k_cache.shape[1 if block_table is None else 2]
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        check_head_scale(name, scale, k_cache, num_kv_heads)
    if validate:
        check_decode_values(k_cache, reuse, block_table, seq_lens)
    where = dict(block_table=block_table, seq_lens=seq_lens)
    index = reuse
    if index is None:
        unit = _page_size(score, bounds, page_size, k_cache, block_table)
        sink_units, recent_units = _forced(k, unit, sink_tokens, recent_tokens)
        scoring = dict(num_lists=num_lists, head_reduce=head_reduce, row_reduce=row_reduce)
        scoring |= dict(softmax=score_softmax, score_scale=score_scale)
        scores = _scores(q, k_cache, score, bounds, unit, causal, where, k_scale, **scoring)
        own_rows = causal and scores.dim() == 4 and q.shape[2] > 1
        if own_rows and seq_lens is None:
            seq_lens = q.new_full((q.shape[0],), k_cache.shape[2], dtype=torch.int32)
        index = select_topk(
            scores,
            k // unit,
            seq_lens=seq_lens,
            page_size=unit,
            sink=sink_units,
            recent=recent_units,
            causal=own_rows,
        )
    out, lse = decode(
        q,
        k_cache,
        v_cache,
        index,
        **where,
        sink=sink,
        k_scale=k_scale,
        v_scale=v_scale,
        softmax_scale=softmax_scale,
        causal=causal,
        return_lse=True,
    )
    results = (out,) + ((index,) if return_index else ()) + ((lse,) if return_lse else ())
    return results if len(results) > 1 else out


def lists_of(num_lists: int | None, num_kv_heads: int, num_heads: int) -> int:
    """``num_lists`` or its default, checked."""
    if num_lists is None:
        return num_kv_heads
    if num_lists not in (1, num_kv_heads, num_heads):
        raise ValueError(
            f"num_lists: expected 1, {num_kv_heads} (KV heads) or {num_heads} (query heads), got "
            f"{num_lists}"
        )
    return num_lists


def _page_size(
    score: str | Tensor,
    bounds: Tensor | None,
    page_size: int | None,
    k_cache: Tensor,
    block_table: Tensor | None,
) -> int:
    """Tokens of what is selected; checks that the bounds belong to this cache."""
    if not isinstance(score, str | Tensor):
        raise TypeError(f"score: expected a name or a tensor, got {type(score).__name__}")
    if isinstance(score, str) and score not in ("quest", "exact"):
        raise ValueError(f"score: expected 'quest', 'exact' or a tensor, got {score!r}")
    if page_size is not None and page_size < 1:
        raise ValueError(f"page_size: expected at least 1, got {page_size}")
    if not isinstance(score, str) or score != "quest":
        if bounds is not None:
            raise ValueError("bounds: have no meaning without score='quest'")
        return page_size or 1
    if bounds is None:
        raise ValueError(
            "bounds: must be given with score='quest'; append_kv and PagedKVCache keep them"
        )
    require_tensor("bounds", bounds)
    if block_table is not None:
        if page_size not in (None, k_cache.shape[1]):
            raise ValueError(
                f"page_size: bounds are those of the cache's pages of {k_cache.shape[1]} tokens, "
                f"got {page_size}"
            )
        shape, page_size = (k_cache.shape[0],), k_cache.shape[1]
    elif page_size is None:
        raise ValueError("page_size: must be given with bounds of a contiguous cache")
    else:
        shape = k_cache.shape[0], -(-k_cache.shape[2] // page_size)
    if tuple(bounds.shape[: len(shape)]) != shape or bounds.dim() != len(shape) + 3:
        raise ValueError(
            f"bounds: expected {[*shape]} pages of [Hkv, 2, D], got shape {list(bounds.shape)}"
        )
    return page_size


def _forced(k: int, unit: int, sink_tokens: int, recent_tokens: int) -> tuple[int, int]:
    """Entries at either end of a list that hold the forced tokens."""
    if k < unit or k % unit:
        raise ValueError(f"k: expected a positive multiple of page_size = {unit}, got {k}")
    for name, tokens in (("sink_tokens", sink_tokens), ("recent_tokens", recent_tokens)):
        if tokens < 0:
            raise ValueError(f"{name}: expected at least 0, got {tokens}")
    sink = -(-sink_tokens // unit)
    # The last page may hold a single token, so the last r lie in up to 1 + ceil((r - 1) / unit).
    recent = 1 + -(-(recent_tokens - 1) // unit) if recent_tokens > 0 else 0
    if (sink + recent) * unit > k:
        raise ValueError(
            f"sink_tokens, recent_tokens: {sink} + {recent} forced entries of {unit} tokens do not "
            f"fit in k = {k}"
        )
    return sink, recent


def _scores(
    q: Tensor,
    k_cache: Tensor,
    score: str | Tensor,
    bounds: Tensor | None,
    unit: int,
    causal: bool,
    where: dict,
    k_scale: Tensor | None,
    *,
    num_lists: int | None,
    head_reduce: str | None,
    row_reduce: str | None,
    softmax: bool,
    score_scale: float | None,
) -> Tensor:
    if isinstance(score, Tensor):
        given = dict(num_lists=num_lists, head_reduce=head_reduce, row_reduce=row_reduce)
        given |= dict(score_scale=score_scale, score_softmax=softmax or None)
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}: has no meaning where score is a tensor")
        return score
    options = dict(element="bounds", page_size=unit) if score == "quest" else {}
    if score == "exact" and unit > 1:
        options = dict(page_reduce="max", page_size=unit)
    if row_reduce is None and q.shape[2] == 1:
        row_reduce = "max"  # the row itself, and a list that serves later calls of any Sq
    paged = where["block_table"] is not None
    num_kv_heads = k_cache.shape[2 if paged else 1]
    num_lists = lists_of(num_lists, num_kv_heads, q.shape[1])
    keys = bounds if score == "quest" else k_cache
    return proxy_scores(
        q,
        keys,
        key_scale=key_scale_of(keys, k_scale, heads_last=score == "exact" and paged),
        **options,
        **where,
        row_reduce=row_reduce,
        softmax=softmax,
        head_reduce=head_reduce or "max",
        num_out_heads=num_lists,
        causal=causal,
        score_scale=score_scale,
    )
