"""Tiles skipped while the softmax runs, without a pre-pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnsieve.methods.base import Method
from attnsieve.ops_threshold import threshold_attention


@dataclass(frozen=True)
class Threshold(Method):
    """Skips key tiles whose largest weight is below ``lambda = scale / seqlen_k``.

    The rule of :func:`attnsieve.threshold_attention`; the scale factor makes one setting serve
    several lengths, as in BLASST (skip-softmax attention, arXiv 2512.12087). 0 skips nothing.
    """

    scale: float
    skip_block: int = 128

    def threshold(self, seqlen_k: int) -> float:
        """lambda for ``seqlen_k`` keys."""
        return self.scale / max(seqlen_k, 1)

    def __call__(
        self, q, k, v, *, causal, window=None, softmax_scale=None, sink=None, layer_idx=None
    ) -> Tensor:
        return threshold_attention(
            q,
            k,
            v,
            self.threshold(k.shape[2]),
            skip_block=self.skip_block,
            causal=causal,
            window=window,
            softmax_scale=softmax_scale,
            sink=sink,
        )
