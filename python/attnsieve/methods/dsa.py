"""Tokens chosen by a trained indexer (DeepSeek Sparse Attention, DeepSeek-V3.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from attnsieve.cache import CachedKV
from attnsieve.methods.decode import DecodeMethod, attend
from attnsieve.ops_cache import proxy_scores
from attnsieve.ops_decode import select_topk


@dataclass(eq=False)
class DSA(DecodeMethod):
    """The ``k`` tokens of largest index score per row, one list for all heads, nothing forced.

    The lightning indexer scores key s for row t ``I(t, s) = sum_h w_h(t) ReLU(q_h(t) . k(s))``.
    Its small queries, keys and weights come from the model, so they are the caller's:

    Attributes:
        indexer: called with ``(layer_idx, q, cache)``; returns the arguments of
            :func:`attnsieve.proxy_scores` that the score is made of: ``q [B, Hi, Sq, di]``,
            ``keys [B, 1, S, di]`` or pages that the cache's ``block_table`` names, ``head_weights``
            float32 ``[B, Hi, Sq]``, and with float8 or int8 keys their ``key_scale``.
        k: budget; a sequence of at most k tokens is attended to completely.
    """

    indexer: Callable[[int, Tensor, CachedKV], dict[str, Tensor]]
    k: int = 2048

    def __call__(
        self, q, cache, *, layer_idx=0, sequence=0, softmax_scale=None, sink=None
    ) -> Tensor:
        scores = proxy_scores(
            **self.indexer(layer_idx, q, cache),
            **cache.where,
            element="relu_dot",
            head_reduce="sum",
            num_out_heads=1,
            causal=True,
        )
        lengths = cache.lengths(q.shape[0])
        index = select_topk(scores, self.k, seq_lens=lengths, causal=True)
        return attend(q, cache, index, softmax_scale=softmax_scale, sink=sink)
