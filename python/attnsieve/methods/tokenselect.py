"""Tokens chosen by a vote of all heads (TokenSelect, Wu et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnsieve.cache import CachedKV
from attnsieve.methods.decode import DecodeMethod, Kept, attend, mean_query
from attnsieve.ops_cache import proxy_scores
from attnsieve.ops_decode import select_topk


@dataclass(eq=False)
class TokenSelect(DecodeMethod):
    """The first ``num_init`` and last ``num_local`` tokens, and of the others the ``k`` best.

    A token's score is the sum over the query heads of their softmax over the others, for the mean
    of the new rows; one list serves all heads of a layer (arXiv 2411.02886). While the cosine of
    that mean with the one of the last selection is at least ``similarity``, the list is used again:
    that reads a decision per layer and step on the host. None selects in every step.

    Two things differ from the authors' code. Logits are scaled by ``1 / sqrt(D)`` unless
    ``score_scale`` says otherwise (theirs: 1.0). A list that is used again keeps the local tokens
    of its time, and newer ones are added: none that leaves the window is lost. Keys are scored as
    they are cached, in most models after RoPE (theirs: before), and attended to at their positions.

    ``state`` holds the lists by (sequence, layer).
    """

    k: int = 2048
    num_init: int = 128
    num_local: int = 512
    similarity: float | None = 0.9
    score_scale: float | None = None

    def __call__(
        self, q, cache, *, layer_idx=0, sequence=0, softmax_scale=None, sink=None
    ) -> Tensor:
        key = sequence, layer_idx
        query = None if self.similarity is None else mean_query(q)
        kept = self.state.get(key)
        if kept is None or query is None:
            kept = self._select(q, cache, query)
        else:
            kept = kept.before(q, cache)
            stale = kept.stale(query, self.similarity)
            if bool(stale.any()):
                kept = kept.updated(stale, self._select(q, cache, query))
        self.state[key] = kept
        return attend(
            q,
            cache,
            kept.index,
            dense_begin=kept.begin,
            softmax_scale=softmax_scale,
            sink=sink,
        )

    def _select(self, q: Tensor, cache: CachedKV, query: Tensor | None) -> Kept:
        votes = proxy_scores(
            q,
            cache.k_cache,
            key_scale=cache.key_scale,
            **cache.where,
            row_reduce="mean",
            softmax=True,
            head_reduce="sum",
            num_out_heads=1,
            skip_first=self.num_init,
            skip_last=self.num_local,
            causal=True,
            score_scale=self.score_scale,
        )
        lengths = cache.lengths(q.shape[0])
        index = select_topk(
            votes,
            self.num_init + self.k + self.num_local,
            seq_lens=lengths,
            sink=self.num_init,
            recent=self.num_local,
        )
        return Kept(index, lengths.clone(), query)
