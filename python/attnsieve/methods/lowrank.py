"""Tokens chosen by low-rank proxies of their keys (LRQK, Li et al., NeurIPS 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from attnsieve.lowrank import LowRankFit, lowrank_fit
from attnsieve.methods.decode import DecodeMethod, attend
from attnsieve.methods.proxies import attend_to_best, side_cache


@dataclass(eq=False)
class LowRank(DecodeMethod):
    """The ``k`` tokens whose proxies of ``rank`` numbers score best, the newest among them.

    A prefill, or the first piece of one, fits projections of its queries and keys in every layer
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

    def prefill(self, q, k, *, layer_idx=0, sequence=0, begin=0) -> None:
        place = sequence, layer_idx
        self.state.pop(place, None)
        if begin == 0 or place not in self.fits:
            self.fits[place] = lowrank_fit(q, k, self.rank, share=self.share, method=self.method)

    def __call__(
        self, q, cache, *, layer_idx=0, sequence=0, softmax_scale=None, sink=None
    ) -> Tensor:
        options = dict(softmax_scale=softmax_scale, sink=sink)
        fit = self.fits.get((sequence, layer_idx))
        if fit is None:
            return attend(q, cache, None, **options)
        proxies = side_cache(self.state, (sequence, layer_idx), cache, q, fit.keys)
        return attend_to_best(
            q,
            cache,
            fit.queries(q),
            proxies,
            k=self.k,
            recent=self.recent,
            list_heads=self.list_heads,
            **options,
        )
