"""Pages chosen by an upper bound of their keys' scores (Quest, Tang et al., ICML 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve.cache import CachedKV
from attnsieve.methods.decode import DecodeMethod, attend, num_lists
from attnsieve.ops_topk import topk_attention


@dataclass(eq=False)
class Quest(DecodeMethod):
    """The ``k / page_size`` pages of largest bound, the newest page always among them.

    The bound of a page is ``sum_i max(q_i * max_i, q_i * min_i)`` over its keys' extremes (arXiv
    2406.10774). The first ``dense_layers`` layers attend to everything. As in the paper every query
    head has its own pages; ``list_heads="kv"`` lets the query heads of a KV head share the pages
    that suit one of them best, so that each page is read once. Later draft rows share the bounds of
    pages that hold their keys.

    A paged cache that keeps bounds is used as it is. Over a contiguous cache without lengths
    ``state`` holds the bounds, of which a step computes those of the newest pages.
    """

    k: int = 2048
    page_size: int = 16
    dense_layers: int = 2
    list_heads: str = "q"

    def __call__(
        self, q, cache, *, layer_idx=0, sequence=0, softmax_scale=None, sink=None
    ) -> Tensor:
        options = dict(softmax_scale=softmax_scale, sink=sink)
        if layer_idx < self.dense_layers:
            return attend(q, cache, None, **options)
        bounds = cache.bounds
        if bounds is None:
            bounds = self._own_bounds(cache, (sequence, layer_idx), q.shape[2])
        return topk_attention(
            q,
            cache.k_cache,
            cache.v_cache,
            k=self.k,
            score="quest",
            bounds=bounds,
            page_size=self.page_size,
            num_lists=num_lists(self.list_heads, q, cache),
            **cache.where,
            **cache.scales,
            **options,
        )

    def _own_bounds(self, cache: CachedKV, key: tuple[int, int], rows: int) -> Tensor:
        """``[B, pages, Hkv, 2, D]`` of a contiguous cache, from those of the last step."""
        keys = cache.k_cache
        others = cache.block_table, cache.seq_lens, cache.k_scale
        if any(x is not None for x in others):
            raise ValueError("cache: Quest needs its bounds (a PagedKVCache with bounds=True)")
        length, pages = keys.shape[2], -(-keys.shape[2] // self.page_size)
        known, held = self.state.get(key, (0, None))
        # What is new begins `rows` before the end, earlier where tokens were taken back.
        first = min(known, length - rows) // self.page_size
        if held is None or held.shape[0] != keys.shape[0]:
            first, held = 0, keys.new_empty(keys.shape[0], 0, keys.shape[1], 2, keys.shape[3])
        if held.shape[1] < pages:
            grown = held.new_empty(held.shape[0], pages + pages // 4 + 1, *held.shape[2:])
            grown[:, :first] = held[:, :first]
            held = grown
        for begin, end in _even_parts(first, pages, length, self.page_size):
            part = keys[:, :, begin * self.page_size : min(end * self.page_size, length)]
            low, high = torch.aminmax(part.unflatten(2, (end - begin, -1)), dim=3)
            held[:, begin:end] = torch.stack([low, high], 3).transpose(1, 2)
        self.state[key] = length, held
        return held[:, :pages]


def _even_parts(first: int, pages: int, length: int, page_size: int) -> list[tuple[int, int]]:
    """Pages ``first .. pages`` in ranges of equally long pages: the full ones, the ragged last."""
    full = max(length // page_size, first)
    return [part for part in ((first, full), (full, pages)) if part[0] < part[1]]
