"""Numbers kept beside cached keys, and attention to the tokens whose numbers score best."""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping

import torch
from torch import Tensor

from attnsieve.cache import CachedKV
from attnsieve.methods.decode import num_lists
from attnsieve.ops_cache import proxy_scores
from attnsieve.ops_topk import topk_attention


def side_cache(
    state: MutableMapping[Hashable, Tensor],
    place: Hashable,
    cache: CachedKV,
    q: Tensor,
    numbers_of: Callable[[Tensor], Tensor],
    rows: int | None = None,
) -> Tensor:
    """``[B, H, capacity, r]``, numbers of every cached key: those at hand, and of the newest rows.

    The first call makes all of them, so does one whose cache has outgrown what is held; others
    write in place and can be captured into a CUDA graph. Keys that no sequence holds give numbers
    of no meaning.

    Args:
        state, place: where the numbers are held.
        q: the step's queries ``[B, Hq, Sq, D]``; their dtype is that of the keys below.
        numbers_of: keys ``[B, Hkv, n, D]`` to numbers ``[B, H, n, r]``.
        rows: keys of each sequence that are newer than the last call; default Sq.
    """
    batch, rows = q.shape[0], q.shape[2] if rows is None else rows
    held, capacity = state.get(place), capacity_of(cache)
    if held is None or held.shape[0] != batch or held.shape[2] < capacity:
        every = torch.arange(capacity, device=q.device).expand(batch, -1)
        held = numbers_of(keys_at(cache, every, q.dtype))
        if cache.block_table is None:
            held = with_room(held)
        state[place] = held
        return held[:, :, :capacity]
    newest = cache.lengths(batch).long()[:, None] - rows + torch.arange(rows, device=q.device)
    newest = newest.clamp(0, capacity - 1)
    numbers = numbers_of(keys_at(cache, newest, q.dtype))
    places = newest[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
    held.scatter_(2, places, numbers)
    return held[:, :, :capacity]


def with_room(numbers: Tensor) -> Tensor:
    """A quarter more rows ``[B, H, n, r]`` for keys to come."""
    return torch.nn.functional.pad(numbers, (0, 0, 0, numbers.shape[2] // 4 + 1))


def attend_to_best(
    q: Tensor,
    cache: CachedKV,
    numbers: Tensor,
    proxies: Tensor,
    *,
    k: int,
    recent: int,
    list_heads: str,
    softmax_scale: float | None,
    sink: Tensor | None,
) -> Tensor:
    """Attention to the ``k`` tokens of largest ``numbers . proxies``, a list per row.

    Args:
        numbers: of the queries, ``[B, Hq, Sq, r]``; proxies: of the keys, ``[B, H, S, r]``.
        k, recent: budget, and how many of the newest tokens are inside it whatever they score.
        list_heads: as in :func:`num_lists`; the largest score over the heads of a list counts.
    """
    scores = proxy_scores(
        numbers,
        proxies,
        seq_lens=cache.lengths(q.shape[0]),
        row_reduce="max" if q.shape[2] == 1 else None,
        head_reduce="max",
        num_out_heads=num_lists(list_heads, q, cache),
        causal=True,
    )
    return topk_attention(
        q,
        cache.k_cache,
        cache.v_cache,
        k=k,
        score=scores,
        recent_tokens=min(recent, k),
        **cache.where,
        **cache.scales,
        softmax_scale=softmax_scale,
        sink=sink,
    )


def capacity_of(cache: CachedKV) -> int:
    """Tokens of a sequence that the cache can hold."""
    if cache.block_table is None:
        return cache.k_cache.shape[2]
    return cache.block_table.shape[1] * cache.k_cache.shape[1]


def keys_at(cache: CachedKV, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, Hkv, n, D]`` of the tokens ``[B, n]``, zeros where there is no page."""
    if cache.block_table is None:
        places = positions[:, None, :, None]
        keys = cache.k_cache
        keys = keys.gather(2, places.expand(-1, keys.shape[1], -1, keys.shape[3])).to(dtype)
    else:
        page_size = cache.k_cache.shape[1]
        pages = cache.block_table.long().gather(1, positions // page_size)
        exists = (pages >= 0) & (pages < cache.k_cache.shape[0])
        keys = cache.k_cache[pages.where(exists, torch.zeros_like(pages)), positions % page_size]
        keys = keys.to(dtype).where(exists[..., None, None], 0).transpose(1, 2)
    if cache.k_scale is not None:
        keys = keys * cache.k_scale.to(dtype)[:, None, None]
    return keys
