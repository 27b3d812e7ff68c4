"""One layer's best tokens serve the layers after it (TidalDecode, Yang et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnsieve.methods.decode import DecodeMethod, attend, num_lists
from attnsieve.ops_cache import proxy_scores
from attnsieve.ops_decode import select_topk


@dataclass(eq=False)
class TidalDecode(DecodeMethod):
    """Two layers of a step select; the layers after each attend to its tokens alone.

    Layers below ``dense_layers`` attend to everything. So do layer ``dense_layers`` and the
    ``correction_layers``, which also select per query head the ``k`` keys of largest logit and
    besides them the newest. Everything is selected anew in every step (arXiv 2410.05076;
    defaults of the authors' code for 32 layers).

    ``list_heads`` "kv" or "one" takes the largest logit over the heads that share a list, which the
    paper, for models without grouped queries, leaves open. ``state`` holds the lists by sequence.
    """

    k: int = 256
    dense_layers: int = 2
    correction_layers: tuple[int, ...] = (13,)
    list_heads: str = "q"

    def __call__(
        self, q, cache, *, layer_idx=0, sequence=0, softmax_scale=None, sink=None
    ) -> Tensor:
        options = dict(softmax_scale=softmax_scale, sink=sink)
        if layer_idx < self.dense_layers:
            self.state.pop(sequence, None)  # of the last step
            return attend(q, cache, None, **options)
        selects = layer_idx == self.dense_layers or layer_idx in self.correction_layers
        if sequence in self.state and not selects:
            return attend(q, cache, self.state[sequence], **options)
        scores = proxy_scores(
            q,
            cache.k_cache,
            key_scale=cache.key_scale,
            **cache.where,
            head_reduce="max",
            num_out_heads=num_lists(self.list_heads, q, cache),
            causal=True,
            score_scale=softmax_scale,
        )
        self.state[sequence] = select_topk(
            scores, self.k + 1, seq_lens=cache.lengths(q.shape[0]), recent=1, causal=True
        )
        return attend(q, cache, None, **options)
