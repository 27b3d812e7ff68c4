"""The runs of a calibration and what follows from them, for one phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnsieve import block_sparse_attention
from attnsieve.cache import CachedKV
from attnsieve.calibration import Check, PhaseFit, Point, fit
from attnsieve.demo import decode
from attnsieve.demo.measure import Call, measure
from attnsieve.demo.model import Subject
from attnsieve.methods import Threshold, ThresholdDecode
from attnsieve.methods.decode import attend


@dataclass(frozen=True)
class Sample:
    """What one scale factor did; scale 0 skips nothing.

    error: of attention outputs, ``|out - dense| / |dense|`` (2-norms of a whole layer, dense over
        the same inputs), mean over the layers, and in decode over the steps.
    perplexity: of all positions; in decode of the tokens that follow the steps.
    """

    length: int
    scale: float
    share: float
    error: float
    perplexity: float

    @property
    def point(self) -> Point:
        return Point(self.length, self.scale, self.share)


@dataclass
class _OutputError:
    """Compares attention outputs with dense attention of the same inputs."""

    errors: list[Tensor] = field(default_factory=list)

    def prefill(self, call: Call) -> None:
        dense = block_sparse_attention(call.q, call.k, call.v, sink=call.sink, **call.mask)
        self._add(call.out, dense)

    def decode(self, q: Tensor, cache: CachedKV, out: Tensor, options: dict) -> None:
        self._add(out, attend(q, cache, None, **options))

    def _add(self, out: Tensor, dense: Tensor) -> None:
        dense = dense.float()
        self.errors.append((out.float() - dense).norm() / dense.norm())

    def mean(self) -> float:
        return float(torch.stack(self.errors).mean())


Run = Callable[[float], Sample]


def prefill_run(subject: Subject, ids: Tensor) -> Run:
    """Passes over all of ``ids``."""

    def run(scale: float) -> Sample:
        error = _OutputError()
        result = measure(subject, ids, Threshold(scale), repeats=1, observe=error.prefill)
        return Sample(ids.shape[1], scale, result["skipped"], error.mean(), result["perplexity"])

    return run


def decode_run(subject: Subject, ids: Tensor, steps: int, num_splits: int) -> Run:
    """The last ``steps`` steps of ``ids`` after one dense prefill, with the text's own tokens."""
    cache = decode.prefill(subject, ids, steps)

    def run(scale: float) -> Sample:
        error, method = _OutputError(), ThresholdDecode(scale, num_splits=num_splits)
        result = decode.run_steps(subject, ids, cache, method, steps, observe=error.decode)
        return Sample(ids.shape[1], scale, result["skipped"], error.mean(), result["perplexity"])

    return run


@dataclass
class Sweep:
    """One phase: ``samples`` at scale 0 and the given ones, for each length.

    checks: (target, what its fitted factor did). refused: why a target has no factor.
    """

    samples: list[Sample]
    fit: PhaseFit
    checks: list[tuple[float, Sample]]
    refused: list[str]


def sweep(
    phase: str,
    runs: Mapping[int, Run],
    scales: Sequence[float],
    targets: Sequence[float],
    announce: Callable[[str], None],
) -> Sweep:
    """Every scale at every length, the fit, and every target at its fitted scale.

    Raises:
        ValueError: the shares give no fit.
    """

    def at(length: int, scale: float) -> Sample:
        announce(f"{phase}: {length} tokens, F = {scale:.5g}")
        return runs[length](scale)

    samples = [at(length, scale) for length in runs for scale in (0.0, *scales)]
    fitted = fit([sample.point for sample in samples if sample.scale > 0])
    chosen, refused = {}, []
    for target in targets:
        try:
            chosen[target] = fitted.scale(target)
        except ValueError as error:
            refused.append(str(error))
    checks = [(target, at(length, chosen[target])) for length in runs for target in chosen]
    records = [Check(x.length, target, x.scale, x.share) for target, x in checks]
    return Sweep(samples, replace(fitted, checks=tuple(records)), checks, refused)
