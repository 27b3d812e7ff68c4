"""The low-rank family in one call: score narrow proxies, keep the k best keys, attend exactly.

Letters as in :mod:`attnsieve.ops_decode`; ``r`` width of a proxy, ``Hp`` heads that have proxies of
their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnsieve._arguments import require_tensor
from attnsieve.offload import WorkingSet
from attnsieve.ops_cache import proxy_scores
from attnsieve.ops_decode import decode, select_topk
from attnsieve.ops_topk import lists_of, topk_attention
from attnsieve.token_index import TokenIndex

__all__ = ["low_rank_attention"]


def low_rank_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    projection: Tensor,
    proxy: Tensor,
    k: int = 2048,
    proxy_scale: Tensor | None = None,
    num_lists: int | None = None,
    head_reduce: str | None = None,
    row_reduce: str | None = None,
    sink_tokens: int = 0,
    recent_tokens: int = 64,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    sink: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    working_set: WorkingSet | None = None,
    validate: bool = False,
    return_index: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor | TokenIndex, ...]:
    """Attention of 1 to 8 new query rows per sequence over the k keys whose proxies score best.

    Three launches: :func:`proxy_scores` of ``(q @ projection) . proxy``, :func:`select_topk` and
    :func:`decode`; codes, several rows and more than 64 numbers take one before them. Nothing
    synchronises and no shape depends on values. :func:`lowrank_fit` makes the projections;
    :class:`PagedKVCache` with ``projection=to_k`` keeps the proxies of paged keys as they are
    written.

    Args:
        q, k_cache, v_cache: as in :func:`topk_attention`, float8 caches too.
        projection: of queries, ``[Hp, D, r]`` or ``[B, Hp, D, r]``: ``LowRankFit.to_q``. Query head
            h takes head ``h // (Hq // Hp)``; converted to q's dtype. r a multiple of 8.
        proxy: of the cached keys, ``[B, Hp, S, r]``, with ``block_table`` pages
            ``[num_pages, P, Hp, r]``. Dtype of q, or float8_e4m3fn or int8 codes.
        k: keys of a list. A sequence of at most k keys is attended to completely.
        proxy_scale: float32, shape of ``proxy`` without r: needed with codes.
        num_lists: lists per sequence: Hq, Hkv (default) or 1. LRQK has one per query head.
        head_reduce: "max" (default), "mean" or "sum" over the query heads that share a list.
        row_reduce: "max", "mean" or "sum" makes one list for all Sq rows. Default None: a list per
            row.
        sink_tokens, recent_tokens: at least so many first and last keys of each row are kept,
            whatever their scores, inside k.
        working_set: of a contiguous cache that lies in host memory (:func:`host_cache`): tokens
            that are in no slot are fetched, and attention reads the slots. One new row, a list per
            KV head, at least k slots, no codes. The newest token counts as written since the last
            call. The result has the bits that it has without.
        block_table, seq_lens, sink, k_scale, v_scale, softmax_scale, causal, validate,
            return_index, return_lse: as in :func:`topk_attention`.

    Returns:
        As :func:`topk_attention`.

    Raises:
        TypeError, ValueError: malformed argument, named in the text.
        NotImplementedError: no kernel for the device, dtype, head dim or r; or gradients are asked
            for: there is no backward yet.

    LRQK (Li et al., NeurIPS 2025, arXiv:2510.23649) selects like this; there the newest rows'
    projections are also refined at every step.
    """
    for name, tensor in (("q", q), ("projection", projection), ("proxy", proxy)):
        require_tensor(name, tensor)
    if q.dim() != 4:
        raise ValueError(f"q: expected 4 dimensions, got shape {list(q.shape)}")
    if projection.dim() not in (3, 4) or projection.shape[-2] != q.shape[3]:
        raise ValueError(
            f"projection: expected [Hp, {q.shape[3]}, r] or [B, Hp, {q.shape[3]}, r], got shape "
            f"{list(projection.shape)}"
        )
    heads = projection.shape[-3]
    if heads == 0 or q.shape[1] % heads:
        raise ValueError(f"projection: {heads} heads do not divide the {q.shape[1]} of q")
    if projection.dim() == 4 and projection.shape[0] != q.shape[0]:
        raise ValueError(f"projection: expected a batch of {q.shape[0]}, got {projection.shape[0]}")
    proxy_heads = 1 if block_table is None else 2
    if proxy.dim() != 4 or proxy.shape[proxy_heads] != heads:
        raise ValueError(f"proxy: expected {heads} heads, got shape {list(proxy.shape)}")
    if row_reduce is None and q.shape[2] == 1:
        row_reduce = "max"  # the row itself, and a list that serves later calls of any Sq
    num_kv_heads = k_cache.shape[proxy_heads]
    if working_set is not None:
        _check_fetched(q, block_table, num_lists, num_kv_heads, k_scale, v_scale)
    scores = proxy_scores(
        q,
        proxy,
        projection=projection.to(q.dtype),
        key_scale=proxy_scale,
        block_table=block_table,
        seq_lens=seq_lens,
        row_reduce=row_reduce,
        head_reduce=head_reduce or "max",
        num_out_heads=lists_of(num_lists, num_kv_heads, q.shape[1]),
        causal=causal,
    )
    if working_set is not None:
        return _attend_fetched(
            q,
            k_cache,
            v_cache,
            scores,
            working_set,
            k=k,
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
            seq_lens=seq_lens,
            sink=sink,
            softmax_scale=softmax_scale,
            returned=(return_index, return_lse),
        )
    return topk_attention(
        q,
        k_cache,
        v_cache,
        k=k,
        score=scores,
        sink_tokens=sink_tokens,
        recent_tokens=recent_tokens,
        block_table=block_table,
        seq_lens=seq_lens,
        sink=sink,
        k_scale=k_scale,
        v_scale=v_scale,
        softmax_scale=softmax_scale,
        causal=causal,
        validate=validate,
        return_index=return_index,
        return_lse=return_lse,
    )


def _check_fetched(q, block_table, num_lists, num_kv_heads, k_scale, v_scale) -> None:
    if q.shape[2] != 1:
        raise NotImplementedError(f"working_set: one new row, got {q.shape[2]} of q")
    if block_table is not None:
        raise NotImplementedError("working_set: not with block_table")
    if k_scale is not None or v_scale is not None:
        raise NotImplementedError("working_set: not with codes")
    if num_lists not in (None, num_kv_heads):
        raise NotImplementedError(
            f"working_set: num_lists: one per KV head ({num_kv_heads}), got {num_lists}"
        )


def _attend_fetched(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scores: Tensor,
    working_set: WorkingSet,
    *,
    k: int,
    sink_tokens: int,
    recent_tokens: int,
    seq_lens: Tensor | None,
    sink: Tensor | None,
    softmax_scale: float | None,
    returned: tuple[bool, bool],
) -> Tensor | tuple[Tensor | TokenIndex, ...]:
    """Attention of one new row over the slots of the tokens that score best."""
    index = select_topk(scores, k, seq_lens=seq_lens, sink=sink_tokens, recent=recent_tokens)
    lengths = seq_lens
    if lengths is None:
        lengths = q.new_full((q.shape[0],), k_cache.shape[2], dtype=torch.int32)
    places = working_set.fetch(index, k_cache, v_cache, first_new=lengths - 1)
    out, lse = decode(
        q,
        working_set.k,
        working_set.v,
        places,
        sink=sink,
        softmax_scale=softmax_scale,
        return_lse=True,
    )
    results = (out,) + ((index,) if returned[0] else ()) + ((lse,) if returned[1] else ())
    return results if len(results) > 1 else out
