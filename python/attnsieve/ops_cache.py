"""Public functions around a KV cache: scores of what it holds, and new rows into it.

Letters as in :mod:`attnsieve.ops_decode`; ``R`` scored query rows, ``dp`` dim of the scored keys,
``P`` tokens of a page. A cache is contiguous or paged, as :func:`attnsieve.decode` takes it. The
float64 oracles are in :mod:`attnsieve.reference_decode`, with the same names and arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnsieve._arguments import (
    call_op,
    check_append_values,
    check_lengths,
    default_scale,
    require_tensor,
)

__all__ = ["append_kv", "proxy_scores"]

# The enums of include/attnsieve/problem.h.
_ELEMENTS = {"dot": 0, "relu_dot": 1, "bounds": 2}
_REDUCTIONS = {None: 0, "max": 1, "mean": 2, "sum": 3}


def _choice(name: str, value: str | None, choices: dict) -> int:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}")
    return choices[value]


def proxy_scores(
    q: Tensor,
    keys: Tensor,
    *,
    element: str = "dot",
    projection: Tensor | None = None,
    key_scale: Tensor | None = None,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    head_weights: Tensor | None = None,
    row_reduce: str | None = None,
    softmax: bool = False,
    head_reduce: str | None = None,
    num_out_heads: int | None = None,
    page_reduce: str | None = None,
    page_size: int | None = None,
    skip_first: int = 0,
    skip_last: int = 0,
    causal: bool = False,
    score_scale: float | None = None,
    validate: bool = False,
) -> Tensor:
    """A score for every cached token or page, for :func:`attnsieve.select_topk` to choose from.

    A unit of ``keys`` is a token, or with ``element="bounds"`` a page. The steps, in this order:
    element, times ``head_weights``, over rows, softmax, over heads, over pages. Candidates are the
    units of the sequence's T keys but the first ``skip_first`` and the last ``skip_last``, where
    their page exists; a masked pair, and what is no candidate, takes part in no step. Sums are
    float32. NaN passes every reduction of its own unit and heads, with ``softmax`` to all units of
    its row and head.

    Args:
        q: ``[B, Hq, R, dp]``, with ``projection`` ``[B, Hq, R, D]``; float16, bfloat16 or float32;
            dp and D multiples of 8 up to 256.
        keys: rows ``[B, Hp, S, dp]``, with ``block_table`` pages ``[num_pages, P, Hp, dp]``; query
            head h reads head ``h // (Hq // Hp)``. With ``element="bounds"`` page minima and maxima,
            in this order, ``[B, pages, Hp, 2, dp]`` or ``[num_pages, Hp, 2, dp]``. Dtype of q, or
            float8_e4m3fn or int8 codes.
        element: "dot" ``s * q.k``; "relu_dot" ``s * max(q.k, 0)``, the lightning indexer of
            DeepSeek-V3.2; "bounds" ``s * sum_i max(q_i * max_i, q_i * min_i)``, Quest's, which no
            ``s * q.k`` of the page exceeds. A bound that is not finite gives its page any score.
        projection: ``[Hm, D, dp]`` or ``[B, Hm, D, dp]``, q's dtype. What is scored is
            ``q @ projection``, rounded to q's dtype; query head h takes matrix ``h // (Hq // Hm)``.
            On a GPU one launch projects and scores for one row (R = 1), proxies without codes and
            matrices as many as key heads, of up to 64 columns; another comes before it else.
        key_scale: float32, shape of ``keys`` without dp: multiplies ``keys``. Needed with codes.
        block_table: int32 ``[B, max_pages]``. Units behind an entry outside ``[0, num_pages)`` are
            no candidates.
        seq_lens: int32 ``[B]``, T of each sequence in tokens, clamped to what the cache can hold.
            Needed with ``block_table``; without, the default is all of ``keys``.
        head_weights: float32 ``[Hq]``, ``[B, Hq]`` or ``[B, Hq, R]``.
        row_reduce: None, "max", "mean" or "sum" over the R rows.
        softmax: each row and query head becomes its softmax over the candidates (TokenSelect).
        head_reduce, num_out_heads: "max", "mean" or "sum" over the consecutive query heads that
            share one of ``num_out_heads``, a divisor of Hq; default Hq.
        page_reduce: None, "max", "mean" or "sum" over the tokens of every page of ``page_size``
            tokens that are candidates. Not with bounds.
        page_size: tokens of a page: of ``page_reduce``, any number, or of the bounds.
        skip_first, skip_last: units at either end of the sequence that are no candidates.
        causal: row i sees keys ``j <= i + T - R``; its pages are those that hold one.
        score_scale: s, positive; default ``1 / sqrt(dp)``.
        validate: check lengths and pages on the host first (synchronises).

    Returns:
        float32 ``[B, num_out_heads, M]``, without ``row_reduce`` ``[B, R, num_out_heads, M]``. M is
        the units that the cache can hold, or the pages of ``page_size`` that they fill. -inf where
        there is no candidate.

    Raises:
        ValueError: malformed argument, named in the text; with ``validate`` also a bad value.
        NotImplementedError: no kernel for the device, dtype or dp; or gradients are asked for:
            there is no backward yet.
    """
    require_tensor("q", q)
    require_tensor("keys", keys)
    if projection is not None:
        require_tensor("projection", projection)
    if num_out_heads is None:
        num_out_heads = q.shape[1] if q.dim() == 4 else 1
    bounds = element == "bounds"
    choices = [_choice("element", element, _ELEMENTS)]
    reductions = (row_reduce, head_reduce, page_reduce)
    for name, how in zip(("row_reduce", "head_reduce", "page_reduce"), reductions, strict=True):
        choices.append(_choice(name, how, _REDUCTIONS))
    if page_size is None:
        if bounds or page_reduce is not None:
            raise ValueError("page_size: must be given with bounds and with page_reduce")
        page_size = 1
    elif not bounds and page_reduce is None:
        raise ValueError("page_size: has no meaning without page_reduce or bounds")
    if validate:
        tokens = page_size if bounds else keys.shape[1]
        capacity = keys.shape[1] * page_size if bounds else keys.shape[2]
        check_lengths(keys.shape[0], tokens, capacity, block_table, seq_lens)
    return call_op(
        torch.ops.attnsieve.proxy_scores.default,
        q,
        keys,
        key_scale,
        projection,
        block_table,
        seq_lens,
        choices[0],
        choices[1],
        softmax,
        choices[2],
        num_out_heads,
        head_weights,
        choices[3],
        page_size,
        skip_first,
        skip_last,
        causal,
        default_scale(q if projection is None else projection, score_scale),
    )


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    seq_lens: Tensor,
    block_table: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    bounds: Tensor | None = None,
    page_size: int | None = None,
    projection: Tensor | None = None,
    proxy: Tensor | None = None,
    validate: bool = False,
) -> None:
    """Writes new rows of K and V into a cache, and page bounds and projected keys beside it.

    Changes ``k_cache``, ``v_cache``, ``bounds`` and ``proxy`` in place. Two sequences may share
    pages that neither writes to; what two of them write to one page comes in no particular order.

    Args:
        k, v: ``[B, Hkv, Sq, D]``, or ``[tokens, Hkv, D]`` with ``cu_seqlens``; float16, bfloat16 or
            float32, D a multiple of 8 up to 256.
        k_cache, v_cache: contiguous ``[B, Hkv, S, D]``, or with ``block_table`` pages
            ``[num_pages, P, Hkv, D]``. Dtype of k, or float8_e4m3fn: codes of ``x / scale``,
            rounded to nearest even; beyond 448 they become 448, NaN stays NaN.
        seq_lens: int32 ``[B]``, lengths *after* the append, the ones that :func:`attnsieve.decode`
            then takes: row i of a sequence's n goes to position ``seq_lens[b] - n + i``. They are
            not clamped. A position below 0, beyond the cache or in a page that does not exist is
            not written anywhere.
        block_table: int32 ``[B, max_pages]``.
        cu_seqlens: int32 ``[B + 1]``, ascending token offsets of the sequences in k and v. On CUDA
            others are noticed with ``validate`` only: without, any rows are written to the places
            of the sequences.
        k_scale, v_scale: float32 ``[Hkv]``; both with a float8 cache, neither without.
        bounds: ``[num_pages, Hkv, 2, D]``, for a contiguous cache
            ``[B, ceil(S / page_size), Hkv, 2, D]``: every page that received a row gets minimum (0)
            and maximum (1) of its keys below the new length, exactly as the cache holds them
            (float8: codes). They are read back, so a rejected draft leaves no trace. NaN passes.
            Dtype of k_cache or float32; any float with a float8 cache.
        page_size: tokens of a page of ``bounds``: needed for a contiguous cache, otherwise P.
        projection, proxy: ``[Hp, D, r]`` and ``[num_pages, P, Hp, r]`` (contiguous
            ``[B, Hp, S, r]``): each position's proxy row becomes its new key row times
            ``projection[hp]``, summed in float32 before any rounding of the cache. Proxy head hp
            reads KV head ``hp // (Hp // Hkv)``; r is a multiple of 8 up to 256.
        validate: check lengths, offsets and pages on the host first (synchronises).

    Raises:
        ValueError: malformed argument, named in the text; with ``validate`` also a bad value.
            Nothing has been written then.
        NotImplementedError: no kernel for the device, dtype, D or r; or gradients are asked for:
            there is no backward yet.

    Bounds are those of Quest, projected keys those of LRQK and other low-rank selectors.
    """
    named = dict(k=k, v=v, k_cache=k_cache, v_cache=v_cache, seq_lens=seq_lens)
    for name, tensor in named.items():
        require_tensor(name, tensor)
    if bounds is None and page_size is not None:
        raise ValueError("page_size: has no meaning without bounds")
    if page_size is None:
        if bounds is not None and block_table is None:
            raise ValueError("page_size: must be given with bounds of a contiguous cache")
        page_size = 1 if bounds is None else k_cache.shape[1]
    if validate:
        check_append_values(k, k_cache, block_table, seq_lens, cu_seqlens)
    call_op(
        torch.ops.attnsieve.append_kv.default,
        k,
        v,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        cu_seqlens,
        k_scale,
        v_scale,
        bounds,
        page_size,
        projection,
        proxy,
    )
