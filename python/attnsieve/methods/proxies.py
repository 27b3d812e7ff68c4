"""Numbers kept beside cached keys, and attention to the tokens whose numbers score best."""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping

import torch
from torch import Tensor

from attnsieve.cache import CachedKV
from attnsieve.methods.decode import num_lists
from attnsieve.methods.newest import capacity_of, keys_at, newest_rows
from attnsieve.ops_cache import proxy_scores
from attnsieve.ops_topk import topk_attention
from attnsieve.token_index import TokenIndex


def side_cache(
    state: MutableMapping[Hashable, Tensor],
    place: Hashable,
    cache: CachedKV,
    q: Tensor,
    numbers_of: Callable[[Tensor], Tensor],
    rows: int | None = None,
) -> Tensor:
    """``[B, H, capacity, r]``, numbers of every cached key: those at hand, and of the newest rows.

    The first call makes all of them, one whose cache has outgrown what is held those that are not
    at hand; others write in place and can be captured into a CUDA graph. Keys that no sequence
    holds give numbers of no meaning.

    Args:
        state, place: where the numbers are held; ``place`` ends with the layer.
        q: the step's queries ``[B, Hq, Sq, D]``; their dtype is that of the keys below.
        numbers_of: keys ``[B, Hkv, n, D]`` to numbers ``[B, H, n, r]``.
        rows: keys of each sequence that are newer than the last call; default Sq. 0 where the
            caller writes their numbers.
    """
    # Layers share what every step of each of them asks for.
    batch, shared = q.shape[0], state if rows is None else {}
    rows = q.shape[2] if rows is None else rows
    held, capacity = state.get(place), capacity_of(cache)
    if held is None or held.shape[0] != batch or held.shape[2] < capacity:
        every = torch.arange(capacity, device=q.device).expand(batch, 1, -1)
        made = numbers_of(keys_at(cache, every, q.dtype))
        if held is not None and held.shape[0] == batch:
            known = every[..., : held.shape[2]] < cache.lengths(batch).view(-1, 1, 1) - rows
            made[:, :, : held.shape[2]] = held.where(known[..., None], made[:, :, : held.shape[2]])
        if cache.block_table is None:
            made = with_room(made)
        state[place] = made
    elif rows:
        newest = newest_rows(shared, place, cache, batch, rows)
        newest.put(held, numbers_of(newest.keys(cache, q.dtype)))
    return state[place][:, :, :capacity]


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
    projection: Tensor | None = None,
    return_index: bool = False,
) -> Tensor | tuple[Tensor, TokenIndex]:
    """Attention to the ``k`` tokens of largest ``numbers . proxies``, a list per row.

    Args:
        numbers: of the queries, ``[B, Hq, Sq, r]``, or with ``projection`` what it makes them of;
            proxies: of the keys, ``[B, H, S, r]``.
        k, recent: budget, and how many of the newest tokens are inside it whatever they score.
        list_heads: as in :func:`num_lists`; the largest score over the heads of a list counts.
        return_index: also return the lists.
    """
    scores = proxy_scores(
        numbers,
        proxies,
        projection=projection,
        seq_lens=cache.seq_lens,
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
        return_index=return_index,
    )
