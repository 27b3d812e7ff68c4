"""SpargeAttn: pooled scores where pooling says something, and skipping on the way.

Zhang et al., arXiv:2502.18137.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve.index import BlockIndex
from attnsieve.methods.base import BlockMethod
from attnsieve.ops import block_sparse_attention
from attnsieve.ops_threshold import threshold_attention
from attnsieve.selection import pooled_block_scores, select_from_scores


@dataclass(frozen=True)
class SpargeAttn(BlockMethod):
    """Mean-pooled top-cdf or top-k among blocks whose rows resemble each other; the others stay.

    A block whose rows have a :func:`self_similarity` up to ``similarity`` is badly told by its
    mean: as queries it keeps every key; as keys it is kept for every row and takes no part in the
    softmax. (Keys are judged after the mean of all keys is taken away.) The other rows keep the
    fewest blocks that hold the share ``cdf`` of the softmax over pooled scores, or
    ``floor(topk * nK)`` blocks, at least one.

    Defaults are the public code's of its cdf variant. Unlike there, products of queries and keys
    are not quantised, causality is exact to the element, and the diagonal blocks are kept, so that
    no row is left without keys. Windows are not part of the method and are refused.

    Args:
        pv_threshold: also skips tiles of 64 keys whose weights are all below ``2 ** -pv_threshold``
            of the greatest so far, by the rule of :func:`attnsieve.threshold_attention`. None, the
            default, does not look; the public code's 50 is below what float32 sums resolve.
        attention_sink: keeps the first block of keys, which causal language models need
            (SmolLM2-135M, 4096 tokens, 64 x 64 blocks, similarity 0.3, cdf 0.95: perplexity 11.94
            with it, 28.30 without, 10.80 dense).
    """

    similarity: float = 0.6
    cdf: float | None = 0.98
    topk: float | None = None
    pv_threshold: float | None = None
    attention_sink: bool = False
    block_q: int = 128
    block_k: int = 64

    def __post_init__(self) -> None:
        if (self.cdf is None) == (self.topk is None):
            raise ValueError("SpargeAttn: give either cdf or topk, and None for the other")

    def select(
        self, q, k, *, causal, window=None, softmax_scale=None, layer_idx=None
    ) -> BlockIndex:
        if window is not None:
            raise NotImplementedError("SpargeAttn: window is not part of the method")
        blocks = dict(block_q=self.block_q, block_k=self.block_k)
        group = q.shape[1] // k.shape[1]
        told_q = self_similarity(q, self.block_q) > self.similarity
        smooth = k.float() - k.mean(2, keepdim=True, dtype=torch.float32)
        told_k = self_similarity(smooth, self.block_k) > self.similarity
        told_k = told_k.repeat_interleave(group, 1).unsqueeze(2)
        # The mean is a constant of each row: the softmax does not change with it.
        scores = pooled_block_scores(q, k, softmax_scale=softmax_scale, **blocks)
        count = None if self.topk is None else max(1, int(self.topk * scores.shape[3]))
        chosen = select_from_scores(
            scores.masked_fill(~told_k, -torch.inf),
            q.shape[2],
            k.shape[2],
            topk=count,
            top_p=self.cdf,
            sink_blocks=int(self.attention_sink),
            causal=causal,
            **blocks,
        )
        kept = chosen.to_dense(scores.shape[3]) | ~told_k | ~told_q.unsqueeze(3)
        if causal:
            last_keys = torch.arange(1, kept.shape[2] + 1, device=q.device) * self.block_q - 1
            last_keys = last_keys.clamp(max=q.shape[2] - 1) + (k.shape[2] - q.shape[2])
            first_keys = torch.arange(kept.shape[3], device=q.device) * self.block_k
            kept &= first_keys <= last_keys.unsqueeze(1)
        return BlockIndex.from_dense(kept, **blocks)

    def attend(self, q, k, v, index, *, sink, **mask) -> Tensor:
        if self.pv_threshold is None:
            return block_sparse_attention(q, k, v, index, sink=sink, **mask)
        threshold = 2.0**-self.pv_threshold
        return threshold_attention(
            q, k, v, threshold, index=index, skip_block=64, sink=sink, **mask
        )


def self_similarity(x: Tensor, block: int) -> Tensor:
    """float32 ``[B, H, ceil(S / block)]``: mean cosine over all pairs of a block's rows.

    Pairs of a row with itself count; a zero row has cosine 0 with everything. ``x`` is
    ``[B, H, S, D]``; the last block may be ragged.
    """
    unit = torch.nn.functional.normalize(x.float(), dim=3)
    ragged = torch.nn.functional.pad(unit, (0, 0, 0, -x.shape[2] % block))
    sums = ragged.unflatten(2, (-1, block)).sum(3)
    sizes = torch.full((sums.shape[2],), float(block), device=x.device)
    if x.shape[2] % block:
        sizes[-1] = x.shape[2] % block
    return sums.square().sum(-1) / sizes.square()
