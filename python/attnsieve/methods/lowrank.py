"""Tokens chosen by low-rank proxies of their keys (LRQK, Li et al., NeurIPS 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnsieve.cache import CachedKV
from attnsieve.lowrank import LowRankFit, lowrank_fit
from attnsieve.methods.decode import DecodeMethod, attend, num_lists
from attnsieve.ops_cache import proxy_scores
from attnsieve.ops_topk import topk_attention


@dataclass(eq=False)
class LowRank(DecodeMethod):
    """The ``k`` tokens whose proxies of ``rank`` numbers score best, the newest among them.

    A prefill fits projections of its queries and keys in every layer
    (:func:`attnsieve.lowrank_fit`); a step projects its own rows. LRQK (arXiv:2510.23649) besides
    refines those at every step (:func:`attnsieve.lowrank_step`), which is not done here. Layers
    without a fit attend to everything.

    ``fits`` holds the projections by (sequence, layer) and is kept by :meth:`reset`; ``state``
    holds the proxies, made from the cache at the first step and of new keys after it.

    Attributes:
        k: budget; the newest ``recent`` tokens are inside it.
        share: "kv_head", or "query_head" as published: see :func:`attnsieve.lowrank_fit`.
        list_heads: "q" one list per query head, as published, "kv" (default) or "one".
    """

    k: int = 2048
    rank: int = 32
    recent: int = 64
    share: str = "kv_head"
    method: str = "lrqk"
    list_heads: str = "kv"
    fits: dict[tuple[int, int], LowRankFit] = field(default_factory=dict, repr=False)

    def prefill(self, q, k, *, layer_idx=0, sequence=0) -> None:
        self.state.pop((sequence, layer_idx), None)
        self.fits[sequence, layer_idx] = lowrank_fit(
            q, k, self.rank, share=self.share, method=self.method
        )

    def __call__(
        self, q, cache, *, layer_idx=0, sequence=0, softmax_scale=None, sink=None
    ) -> Tensor:
        options = dict(softmax_scale=softmax_scale, sink=sink)
        fit = self.fits.get((sequence, layer_idx))
        if fit is None:
            return attend(q, cache, None, **options)
        scores = proxy_scores(
            fit.queries(q),
            self._proxies(fit, q, cache, (sequence, layer_idx)),
            seq_lens=cache.lengths(q.shape[0]),
            row_reduce="max" if q.shape[2] == 1 else None,
            head_reduce="max",
            num_out_heads=num_lists(self.list_heads, q, cache),
            causal=True,
        )
        return topk_attention(
            q,
            cache.k_cache,
            cache.v_cache,
            k=self.k,
            score=scores,
            recent_tokens=min(self.recent, self.k),
            **cache.where,
            **cache.scales,
            **options,
        )

    def _proxies(self, fit: LowRankFit, q: Tensor, cache: CachedKV, key: tuple[int, int]) -> Tensor:
        """``[B, H, capacity, r]``: those at hand, and of the newest rows."""
        batch, rows = q.shape[0], q.shape[2]
        held = self.state.get(key)
        capacity = _capacity(cache)
        if held is None or held.shape[0] != batch or held.shape[2] < capacity:
            every = torch.arange(capacity, device=q.device).expand(batch, -1)
            held = fit.keys(_keys_at(cache, every, q.dtype))
            room = capacity // 4 + 1 if cache.block_table is None else 0
            held = torch.nn.functional.pad(held, (0, 0, 0, room))
            self.state[key] = held
            return held[:, :, :capacity]
        newest = cache.lengths(batch).long()[:, None] - rows + torch.arange(rows, device=q.device)
        newest = newest.clamp(0, capacity - 1)
        numbers = fit.keys(_keys_at(cache, newest, q.dtype))
        places = newest[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
        held.scatter_(2, places, numbers)
        return held[:, :, :capacity]


def _capacity(cache: CachedKV) -> int:
    if cache.block_table is None:
        return cache.k_cache.shape[2]
    return cache.block_table.shape[1] * cache.k_cache.shape[1]


def _keys_at(cache: CachedKV, positions: Tensor, dtype: torch.dtype) -> Tensor:
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
