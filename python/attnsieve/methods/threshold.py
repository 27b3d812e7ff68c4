"""Tiles skipped while the softmax runs, without a pre-pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnsieve import threshold_attention
from attnsieve.calibration import Calibration
from attnsieve.methods.base import Method
from attnsieve.methods.decode import DecodeMethod


@dataclass(frozen=True)
class Threshold(Method):
    """Skips key tiles whose largest weight is below ``lambda = scale_factor / seqlen_k``.

    The rule of :func:`attnsieve.threshold_attention`; the scale factor makes one setting serve
    several lengths, as in BLASST (skip-softmax attention, arXiv 2512.12087). It is ``scale``, where
    0 skips nothing, or what a ``calibration`` says for the share ``target_sparsity`` of the tiles.
    """

    scale: float | None = None
    skip_block: int = 128
    target_sparsity: float | None = None
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if (self.scale is None) == (self.target_sparsity is None):
            raise ValueError("Threshold: give either scale or target_sparsity with a calibration")
        if (self.target_sparsity is None) != (self.calibration is None):
            raise ValueError("Threshold: target_sparsity and calibration go together")
        if self.calibration is None:
            return
        self.calibration.scale("prefill", self.target_sparsity)  # raises now, not in a layer
        if self.calibration.skip_block != self.skip_block:
            raise ValueError(
                f"skip_block: the calibration is of {self.calibration.skip_block} keys per tile, "
                f"not {self.skip_block}"
            )

    @property
    def scale_factor(self) -> float:
        """``scale``, or the calibrated one."""
        if self.scale is not None:
            return self.scale
        return self.calibration.scale("prefill", self.target_sparsity)

    def threshold(self, seqlen_k: int) -> float:
        """lambda for ``seqlen_k`` keys."""
        return self.scale_factor / max(seqlen_k, 1)

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


@dataclass(eq=False)
class ThresholdDecode(DecodeMethod):
    """The rule of :class:`Threshold` in decode steps: of skipped tiles no value is read.

    lambda is ``scale / keys`` of each sequence. Every key is scored; the query heads of a KV head
    decide together.

    Args:
        scale: the factor; decode takes smaller ones than prefill, whose groups hold more rows.
        two_phase: compare with the largest logit of the whole sequence, found first, instead of the
            running one: skips more, and depends on no order.
        num_splits: visiting sequences. Each keeps its first tile and knows the maximum of its own
            tiles alone, so fewer skip more. The op's default fills a GPU: small batches get a split
            per tile, of which nothing can be skipped.
    """

    scale: float
    two_phase: bool = False
    num_splits: int | None = None

    def __call__(
        self, q, cache, *, layer_idx=0, sequence=0, softmax_scale=None, sink=None
    ) -> Tensor:
        return self._attend(q, cache, softmax_scale=softmax_scale, sink=sink)

    def counted(self, q, cache, *, softmax_scale=None, sink=None) -> tuple[Tensor, Tensor]:
        """A call's output, and int64 ``[B, Hq, 2]``: (skipped, total) tiles."""
        options = dict(softmax_scale=softmax_scale, sink=sink)
        return self._attend(q, cache, return_counters=True, **options)

    def _attend(self, q, cache, **options):
        return threshold_attention(
            q,
            cache.k_cache,
            cache.v_cache,
            self.scale / cache.lengths(q.shape[0]).clamp(min=1).float().unsqueeze(1),
            phase="decode",
            two_phase=self.two_phase,
            num_splits=self.num_splits,
            causal=True,
            **cache.where,
            **cache.scales,
            **options,
        )
