"""A full step's most attended tokens serve the steps after it (Recycled Attention, Xu et al.)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve.cache import CachedKV
from attnsieve.methods.decode import DecodeMethod, Kept, attend, mean_query
from attnsieve.ops_cache import proxy_scores
from attnsieve.ops_decode import select_topk


@dataclass(eq=False)
class Recycled(DecodeMethod):
    """Full attention every ``stride`` steps; between, its ``k`` best tokens and all newer ones.

    A full step ranks the keys by the weight that the newest row gives them, summed over the query
    heads of each KV head, and every layer keeps its own lists (arXiv 2411.05787). The schedule is a
    fixed stride, or with ``similarity`` also the step at which the query's cosine with that of the
    last full step falls below it: that reads a decision per layer and step on the host.

    ``k``, ``stride`` and the sum over the group are choices made here; the paper's values could not
    be read. ``state`` holds by (sequence, layer) the lists and the steps since they were chosen.
    """

    k: int = 2048
    stride: int = 16
    similarity: float | None = None

    def __call__(
        self, q, cache, *, layer_idx=0, sequence=0, softmax_scale=None, sink=None
    ) -> Tensor:
        options = dict(softmax_scale=softmax_scale, sink=sink)
        key = sequence, layer_idx
        query = None if self.similarity is None else mean_query(q)
        kept, age = self.state.get(key, (None, 0))
        if kept is None or age >= self.stride:
            self.state[key] = self._select(q, cache, query, softmax_scale), 1
            return attend(q, cache, None, **options)
        kept, stale = kept.before(q, cache), None
        if query is not None:
            stale = kept.stale(query, self.similarity)
            if not bool(stale.any()):
                stale = None
        recycled = attend(q, cache, kept.index, dense_begin=kept.begin, **options)
        if stale is not None:
            kept = kept.updated(stale, self._select(q, cache, query, softmax_scale))
            full = attend(q, cache, None, **options)
            recycled = torch.where(stale.view(-1, 1, 1, 1), full, recycled)
        self.state[key] = kept, age + 1
        return recycled

    def _select(
        self, q: Tensor, cache: CachedKV, query: Tensor | None, softmax_scale: float | None
    ) -> Kept:
        weights = proxy_scores(
            q[:, :, -1:],
            cache.k_cache,
            key_scale=cache.key_scale,
            **cache.where,
            row_reduce="max",
            softmax=True,
            head_reduce="sum",
            num_out_heads=cache.num_kv_heads,
            score_scale=softmax_scale,
        )
        lengths = cache.lengths(q.shape[0])
        index = select_topk(weights, self.k, seq_lens=lengths)
        return Kept(index, lengths.clone(), query)
