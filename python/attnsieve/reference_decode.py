"""float64 oracles of the decode family: score, select, attend and append over a KV cache.

Plain and slow, by loops over sequences, heads and rows; they share nothing with the kernels. ``B``
batch, ``Hq``/``Hkv`` heads, ``Sq`` new query rows, ``D`` head dim, ``P`` tokens of a cache page. A
cache is contiguous ``[B, Hkv, S, D]``, or pages ``[num_pages, P, Hkv, D]`` with ``block_table``
int32 ``[B, max_pages]`` and ``seq_lens`` int32 ``[B]``, lengths that include the new rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnsieve._arguments import check_append_values, check_decode_values, check_lengths
from attnsieve._reference_attention import (
    cached_rows,
    dequantized,
    lengths_of,
    softmax_attention,
)
from attnsieve._reference_selection import visible_mask
from attnsieve._reference_threshold import scaled_scores
from attnsieve._reference_token_selection import select_threshold, select_topk
from attnsieve.token_index import TokenIndex

__all__ = ["append_kv", "decode", "proxy_scores", "select_threshold", "select_topk"]


def _listed(index: TokenIndex, b: int, row: int, head: int, num_heads: int) -> list[int]:
    """The entries that query head ``head`` reads for new row ``row``, padding left out."""
    where = (b, row) if index.per_row else (b,)
    where = (*where, head // (num_heads // index.num_lists))
    count = index.capacity if index.counts is None else int(index.counts[where])
    return [e for e in index.indices[where][: max(count, 0)].tolist() if e >= 0]


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
    """Oracle of ``decode``: attention of a few new query rows over what ``index`` lists.

    Args:
        q: ``[B, Hq, Sq, D]``. Row i sees keys ``j <= i + T - Sq`` of its T cached ones (all of
            them where not ``causal``); its own key is in the cache already.
        k_cache, v_cache: see the module's head; any dtype, with ``k_scale``, ``v_scale`` float32
            ``[Hkv]`` codes that are multiplied by them.
        index: None attends to every visible key.
        seq_lens: clamped to ``[0, capacity]``; default the capacity of a contiguous cache.
        dense_begin, recent: int32 ``[B]`` and a number. Keys from
            ``min(dense_begin[b], T - recent)`` on are attended besides the list, each once: list
            entries there are dropped. Only with an index.
        sink: float32 ``[Hq]``: one more logit per row that has no value.
        num_splits: how a kernel divides the work; no meaning here.
        validate: raise for lengths, pages and entries out of range instead of skipping them.

    Returns:
        ``out`` float64 ``[B, Hq, Sq, D]``, or ``(out, lse)`` with ``lse [B, Hq, Sq]``, natural
        logarithm, sink included. A row with nothing: 0 and -inf (with a sink: 0 and the sink).
    """
    batch, num_heads, rows, _ = q.shape
    num_kv_heads = k_cache.shape[1 if block_table is None else 2]
    capacity = k_cache.shape[2]
    if block_table is not None:
        capacity = block_table.shape[1] * k_cache.shape[1]
    ranged = dense_begin is not None or recent > 0
    if index is None and ranged:
        raise ValueError("dense_begin, recent: everything is attended without an index")
    if index is not None and index.physical and (block_table is None or index.page_size > 1):
        raise ValueError("index: physical entries are slots of single tokens in a paged cache")
    if validate:
        check_decode_values(k_cache, index, block_table, seq_lens)
    head_axis = 1 if block_table is None else 2
    keys, values = (
        dequantized(x, scale, head_axis) for x, scale in ((k_cache, k_scale), (v_cache, v_scale))
    )
    out = torch.zeros(*q.shape[:3], v_cache.shape[-1], dtype=torch.float64, device=q.device)
    lse = torch.zeros(batch, num_heads, rows, dtype=torch.float64, device=q.device)
    for b, length in enumerate(lengths_of(seq_lens, batch, capacity)):
        own_k, exists = cached_rows(keys, block_table, b, length)
        own_v, _ = cached_rows(values, block_table, b, length)
        visible = visible_mask(rows, length, causal=causal, device=q.device) & exists
        begin = length
        if dense_begin is not None:
            begin = min(begin, max(int(dense_begin[b]), 0))
        if recent > 0:
            begin = min(begin, max(length - recent, 0))
        slots = 0
        if index is not None and index.physical:  # slots are keys of their own, behind the others
            slots = keys.shape[0] * keys.shape[1]
            flat_k, flat_v = (x.flatten(0, 1).transpose(0, 1) for x in (keys, values))
            own_k, own_v = torch.cat([own_k, flat_k], 1), torch.cat([own_v, flat_v], 1)
        for h in range(num_heads):
            times = torch.zeros(rows, length + slots, dtype=torch.int64, device=q.device)
            for i in range(rows):
                if index is None:
                    times[i, :length] = 1
                    continue
                for entry in _listed(index, b, i, h, num_heads):
                    if index.physical:
                        if entry < slots:
                            times[i, length + entry] += 1
                    else:
                        first = entry * index.page_size
                        times[i, first : first + index.page_size] += 1
                times[i, begin:length] = 1  # once, whatever the list says
            times[:, :length] *= visible
            kv_head = h // (num_heads // num_kv_heads)
            scores = scaled_scores(q[b, h], own_k[kv_head], softmax_scale)
            own_sink = None if sink is None else sink[h]
            out[b, h], lse[b, h] = softmax_attention(scores, own_v[kv_head], times, own_sink)
    return (out, lse) if return_lse else out


def _reduce(x: Tensor, mask: Tensor, how: str, dim: int) -> Tensor:
    """max, sum or mean of ``x`` where ``mask``; -inf where nothing is left. NaN spreads."""
    if how == "max":
        reduced = x.masked_fill(~mask, -math.inf).amax(dim)
    else:
        reduced = x.masked_fill(~mask, 0.0).sum(dim)
        if how == "mean":
            reduced = reduced / mask.sum(dim)
        elif how != "sum":
            raise ValueError(f"expected max, sum or mean, got {how!r}")
    return reduced.masked_fill(~mask.any(dim), -math.inf)


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
    """Oracle of ``proxy_scores``: a score for every cached token or page.

    Args:
        q: ``[B, Hq, R, dp]``, R query rows.
        keys: rows ``[B, Hp, S, dp]`` or pages ``[num_pages, P, Hp, dp]``, head h reading
            ``h // (Hq // Hp)``; with ``element="bounds"`` page minima and maxima (in this order),
            ``[B, pages, Hp, 2, dp]`` or ``[num_pages, Hp, 2, dp]``.
        element: "dot" ``s * q.k``; "relu_dot" ``s * max(q.k, 0)`` (lightning indexer); "bounds"
            ``s * sum_i max(q_i * max_i, q_i * min_i)`` (Quest), never below ``s * q.k`` of a key of
            the page. ``s`` is ``score_scale``, default ``1 / sqrt(dp)``.
        projection: ``[Hm, D, dp]`` or ``[B, Hm, D, dp]``: ``q @ projection`` is scored, rounded to
            q's dtype; head h takes matrix ``h // (Hq // Hm)``.
        key_scale: float32, shape of ``keys`` without dp: codes of ``keys`` are multiplied by it.
        head_weights: ``[Hq]``, ``[B, Hq]`` or ``[B, Hq, R]``: multiply the element.
        row_reduce, head_reduce, page_reduce: None, "max", "mean" or "sum"; rows first, then (with
            ``softmax``) each row and head becomes its softmax over the candidates, then the heads
            that share one of ``num_out_heads`` (contiguous groups), then pages of ``page_size``
            tokens. Masked pairs and tokens are left out.
        page_size: tokens of a page: of ``page_reduce``, or of the bounds.
        skip_first, skip_last: tokens (pages, for bounds) at either end that are no candidates.
        causal: row i sees keys ``j <= i + T - R``; its pages are those that hold one.
        validate: raise for lengths and pages out of range.

    Returns:
        float64 ``[B, num_out_heads, M]``, without ``row_reduce`` ``[B, R, num_out_heads, M]``; M
        tokens or pages that the cache can hold, -inf for those that are no candidates.
    """
    bounds = element == "bounds"
    if projection is not None:
        grouped = q.double().unflatten(1, (projection.shape[-3], -1))
        narrow = grouped @ projection.double().unsqueeze(-3)
        q = narrow.flatten(1, 2).to(q.dtype)
    batch, num_heads, num_rows, dim = q.shape
    scale = 1.0 / math.sqrt(dim) if score_scale is None else score_scale
    unit = page_size if bounds else 1
    if block_table is not None:
        units = block_table.shape[1] * (1 if bounds else keys.shape[1])
    else:
        units = keys.shape[1 if bounds else 2]
    out_heads = num_heads if num_out_heads is None else num_out_heads
    if head_reduce is None and out_heads != num_heads:
        raise ValueError(f"head_reduce: {num_heads} heads cannot become {out_heads} without one")
    if validate:
        tokens = page_size if bounds else keys.shape[1]
        check_lengths(keys.shape[0], tokens, units * unit, block_table, seq_lens)
    keys = keys.double() if key_scale is None else keys.double() * key_scale.double().unsqueeze(-1)
    results = []
    for b, length in enumerate(lengths_of(seq_lens, batch, units * unit)):
        side, exists = _key_side(keys, block_table, b, units, bounds)
        side = side.repeat_interleave(num_heads // side.shape[0], dim=0)  # [Hq, M, (2,) dp]
        if bounds:
            own = q[b].double().unsqueeze(2).unsqueeze(3)  # [Hq, R, 1, 1, dp]
            x = (own * side.unsqueeze(1)).amax(3).sum(-1)
        else:
            x = q[b].double() @ side.transpose(1, 2)
            x = torch.where(x < 0, 0.0, x) if element == "relu_dot" else x
        x = (x * scale).transpose(0, 1)  # [R, Hq, M]
        if head_weights is not None:
            weights = head_weights if head_weights.dim() == 1 else head_weights[b]
            weights = weights.double().reshape(num_heads, -1).T  # [R or 1, Hq]
            x = x * weights.unsqueeze(-1)
        seen = torch.zeros(num_rows, units, dtype=torch.bool, device=q.device)
        last = -(-length // unit) - skip_last
        for i in range(num_rows):
            visible = min(max(length - num_rows + 1 + i, 0), length) if causal else length
            seen[i, skip_first : max(min(-(-visible // unit), last), 0)] = True
        seen = (seen & exists)[:, None].expand(x.shape)
        if row_reduce is not None:
            x, seen = _reduce(x, seen, row_reduce, 0)[None], seen.any(0)[None]
        x = x.masked_fill(~seen, -math.inf)
        if softmax:
            weights = torch.softmax(x, -1)
            none = ~((x > -math.inf) | x.isnan()).any(-1, keepdim=True)
            x = weights.masked_fill(none, 0.0).masked_fill(~seen, -math.inf)
        if head_reduce is not None:
            x, seen = (t.unflatten(1, (out_heads, -1)) for t in (x, seen))
            x, seen = _reduce(x, seen, head_reduce, 2), seen.any(2)
        if page_reduce is not None:
            x, seen = _in_pages(x, page_size, -math.inf), _in_pages(seen, page_size, False)
            x = _reduce(x, seen, page_reduce, -1)
        results.append(x if row_reduce is None else x[0])
    return torch.stack(results)


def _in_pages(x: Tensor, page_size: int, fill) -> Tensor:
    """[..., M] -> [..., ceil(M / page_size), page_size]."""
    missing = -x.shape[-1] % page_size
    return torch.nn.functional.pad(x, (0, missing), value=fill).unflatten(-1, (-1, page_size))


def _key_side(keys: Tensor, block_table: Tensor | None, b: int, units: int, bounds: bool):
    """``[Hp, M, dp]`` (bounds ``[Hp, M, 2, dp]``) of sequence b, and which of the M exist."""
    if not bounds:
        return cached_rows(keys, block_table, b, units)
    if block_table is None:
        return keys[b].transpose(0, 1), torch.ones(units, dtype=torch.bool, device=keys.device)
    pages = block_table[b].long()
    exists = (pages >= 0) & (pages < keys.shape[0])
    side = torch.zeros(units, *keys.shape[1:], dtype=keys.dtype, device=keys.device)
    side[exists] = keys[pages[exists]]
    return side.transpose(0, 1), exists


_E4M3_MAX = 448.0


def _store(x: Tensor, cache: Tensor, scale: float) -> Tensor:
    """``x / scale`` in the cache's dtype; float8 saturates at its largest number."""
    x = x.double() / scale
    if cache.dtype == torch.float8_e4m3fn:
        x = x.clamp(-_E4M3_MAX, _E4M3_MAX).float()  # clamp keeps NaN
    return x.to(cache.dtype)


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
    """Oracle of ``append_kv``: writes new rows into the cache and its side caches, in place.

    Args:
        k, v: ``[B, Hkv, Sq, D]``, or ``[T, Hkv, D]`` with ``cu_seqlens`` int32 ``[B + 1]``.
        seq_lens: int32 ``[B]``, lengths *after* the append: row i of n goes to position
            ``seq_lens[b] - n + i``. Positions below 0, beyond the cache or in a page that does not
            exist are not written.
        k_scale, v_scale: float32 ``[Hkv]``: the caches hold ``x / scale``.
        bounds: ``[num_pages, Hkv, 2, D]`` (contiguous ``[B, pages, Hkv, 2, D]``, pages of
            ``page_size`` tokens): minimum and maximum of the stored keys of every page that
            received a row, over all its rows below the new length. NaN spreads.
        projection, proxy: ``[Hp, D, r]`` and rows ``[num_pages, P, Hp, r]`` (contiguous
            ``[B, Hp, S, r]``): proxy row = new key row . projection; Hp = Hkv or Hq.
        validate: raise for lengths, offsets and pages that leave a row without a place.
    """
    if validate:
        check_append_values(k, k_cache, block_table, seq_lens, cu_seqlens)
    batch = seq_lens.shape[0]
    for b in range(batch):
        if cu_seqlens is None:
            own_k, own_v = k[b], v[b]
        else:
            rows = slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
            own_k, own_v = k[rows].transpose(0, 1), v[rows].transpose(0, 1)
        length, num_rows = int(seq_lens[b]), own_k.shape[1]
        touched = set()
        for i in range(num_rows):
            place = _place(k_cache, block_table, b, length - num_rows + i)
            if place is None:
                continue
            touched.add((length - num_rows + i) // (page_size or k_cache.shape[1]))
            for h in range(own_k.shape[0]):
                for x, cache, scale in ((own_k, k_cache, k_scale), (own_v, v_cache, v_scale)):
                    where = _at_head(place, h, block_table)
                    cache[where] = _store(x[h, i], cache, 1.0 if scale is None else float(scale[h]))
            for hp in range(0 if proxy is None else projection.shape[0]):
                key = own_k[hp // (projection.shape[0] // own_k.shape[0]), i]
                row = key.double() @ projection[hp].double()
                proxy[_at_head(place, hp, block_table)] = row.to(proxy.dtype)
        for page in touched if bounds is not None else ():
            _update_bounds(bounds, k_cache, block_table, b, page, length, page_size)


def _place(cache: Tensor, block_table: Tensor | None, b: int, position: int):
    """(sequence or page, row) of a position; None where there is no such place."""
    if position < 0:
        return None
    if block_table is None:
        return (b, position) if position < cache.shape[2] else None
    slot, row = divmod(position, cache.shape[1])
    page = int(block_table[b, slot]) if slot < block_table.shape[1] else -1
    return (page, row) if 0 <= page < cache.shape[0] else None


def _at_head(place: tuple[int, int], head: int, block_table: Tensor | None):
    return (place[0], head, place[1]) if block_table is None else (*place, head)


def _update_bounds(bounds, k_cache, block_table, b, page, length, page_size) -> None:
    if block_table is None:
        keys = k_cache[b, :, page * page_size : min(length, (page + 1) * page_size)]
        target = bounds[b, page]
    else:
        tokens = k_cache.shape[1]
        physical = int(block_table[b, page])
        keys = k_cache[physical, : min(length - page * tokens, tokens)].transpose(0, 1)
        target = bounds[physical]
    keys = keys.double()
    target[:, 0], target[:, 1] = keys.amin(1).to(bounds.dtype), keys.amax(1).to(bounds.dtype)
