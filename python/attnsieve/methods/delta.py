"""Pages of largest attention mass, chosen at a few layers (DELTA, 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnsieve.methods.decode import DecodeMethod, attend
from attnsieve.ops_cache import proxy_scores
from attnsieve.ops_decode import select_topk


@dataclass(eq=False)
class Delta(DecodeMethod):
    """Delta layers attend to everything and choose ``k / page_size`` pages for the layers after.

    A token counts with the largest weight that any query head gives it, a page with the sum over
    its tokens; the last ``recent_pages`` are always kept, inside the budget. One list serves all
    heads, and is chosen anew in every step. Layers below ``dense_layers`` attend to everything
    (arXiv 2510.09883; the delta layers of the paper are found per model, these are an example's).

    Weights leave a sink logit out. ``state`` holds the lists by sequence.
    """

    k: int = 1024
    page_size: int = 16
    recent_pages: int = 8
    dense_layers: int = 2
    delta_layers: tuple[int, ...] = (2, 14, 22)

    def __call__(
        self, q, cache, *, layer_idx=0, sequence=0, softmax_scale=None, sink=None
    ) -> Tensor:
        options = dict(softmax_scale=softmax_scale, sink=sink)
        if layer_idx < self.dense_layers:
            self.state.pop(sequence, None)  # of the last step
            return attend(q, cache, None, **options)
        if sequence in self.state and layer_idx not in self.delta_layers:
            return attend(q, cache, self.state[sequence], **options)
        mass = proxy_scores(
            q,
            cache.k_cache,
            key_scale=cache.key_scale,
            **cache.where,
            softmax=True,
            head_reduce="max",
            num_out_heads=1,
            page_reduce="sum",
            page_size=self.page_size,
            causal=True,
            score_scale=softmax_scale,
        )
        self.state[sequence] = select_topk(
            mass,
            self.k // self.page_size,
            seq_lens=cache.lengths(q.shape[0]),
            page_size=self.page_size,
            recent=self.recent_pages,
            causal=True,
        )
        return attend(q, cache, None, **options)
