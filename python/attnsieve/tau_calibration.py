"""SALE's threshold tau for every head of a model, found by halving, kept as JSON.

    calibration = TauCalibration.load("sale.json")     # written by `attnsieve calibrate sale`
    with use(SALE.calibrated(calibration)):            # attnsieve.integrations.transformers
        model.generate(**inputs)

Heads differ: at an equal error of the output one may skip nine blocks in ten, another none. The
search is SALE's (arXiv:2505.24179): start high, halve while a head's output is further from dense
attention than a budget, and leave heads dense that reach the end of the range.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from attnsieve._records import read_record, write_record
from attnsieve.ops import block_sparse_attention
from attnsieve.ops_estimate import LOCAL_TOKENS, SINK_TOKENS, quantized_estimate_attention

__all__ = ["METRICS", "TauCalibration", "search_tau"]

SCHEMA = 1
METRICS = ("relative", "absolute")
PAPER_START, PAPER_END = 0.008, 1e-4


@dataclass(frozen=True)
class TauCalibration:
    """The thresholds of one model.

    Attributes:
        model: its name. version: of the library that measured.
        metric, budget: what a head's error had to stay below, see :func:`search_tau`.
        lengths: of the texts in tokens; a head's tau is the smallest over them.
        taus: of each layer, of each query head; 0 is dense.
        errors: the largest over the texts, in units of the metric.
        bits, block_q, block_k, row_stride, sink_tokens, local_tokens: the estimate's, as in
            :func:`attnsieve.quantized_estimate_attention`; tau holds for these alone.
    """

    model: str
    version: str
    metric: str
    budget: float
    lengths: tuple[int, ...]
    taus: tuple[tuple[float, ...], ...]
    errors: tuple[tuple[float, ...], ...]
    bits: int = 4
    block_q: int = 64
    block_k: int = 32
    row_stride: int = 1
    sink_tokens: int = SINK_TOKENS
    local_tokens: int = LOCAL_TOKENS

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {self.metric!r}")
        shapes = [[len(layer) for layer in table] for table in (self.taus, self.errors)]
        if not self.taus or shapes[0] != shapes[1]:
            raise ValueError("taus, errors: expected numbers for the same heads of each layer")
        if any(not tau >= 0 for layer in self.taus for tau in layer):
            raise ValueError("taus: expected numbers >= 0")

    @property
    def estimate(self) -> dict:
        """The estimate's options, as keyword arguments."""
        names = ("bits", "block_q", "block_k", "row_stride", "sink_tokens", "local_tokens")
        return {name: getattr(self, name) for name in names}

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the calibration as JSON."""
        write_record(path, self, SCHEMA)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> TauCalibration:
        """Reads what :meth:`save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not a calibration of this schema; the text names what is wrong.
        """
        return read_record(path, cls, SCHEMA, ("taus", "errors"))


def search_tau(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    budget: float,
    metric: str = "relative",
    start: float = PAPER_START,
    end: float = PAPER_END,
    causal: bool = True,
    softmax_scale: float | None = None,
    **estimate,
) -> tuple[Tensor, Tensor]:
    """The largest tau of each head, among start, start / 2 ..., that keeps its output near dense.

    Args:
        q: ``[B, Hq, Sq, D]``; k, v: ``[B, Hkv, Sk, D]``: one layer's, of a text to calibrate on.
        budget: what a head's error has to stay below.
        metric: "relative": ``|out - dense| / |dense|``, 2-norms over all rows of the head.
            "absolute": the sum of ``|out - dense|`` over rows and dims, over the number of rows:
            the paper's, with a budget of 0.4 for Llama-3.1-8B.
        start, end: the range. A head that needs a tau of ``end`` or less becomes dense, tau 0.
        causal, softmax_scale, estimate: as in :func:`attnsieve.quantized_estimate_attention`.

    Returns:
        ``(taus, errors)``, float64 ``[Hq]`` on the CPU.

    Raises:
        ValueError: metric is neither; budget or range not positive.
    """
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    if not (budget > 0 and start > end > 0):
        raise ValueError(f"budget, start, end: {budget}, {start}, {end} leave nothing to search")
    mask = dict(causal=causal, softmax_scale=softmax_scale)
    dense = block_sparse_attention(q, k, v, **mask).double()
    taus = torch.full((q.shape[1],), start, dtype=torch.float64)
    while True:
        there = taus.to(q.device, torch.float32)
        out = quantized_estimate_attention(q, k, v, tau=there, **mask, **estimate).double()
        errors = _errors(out, dense, metric).cpu()
        failed = (errors >= budget) & (taus > 0)
        if not failed.any():
            return taus, errors
        taus = torch.where(failed, taus / 2, taus)
        taus[taus <= end] = 0.0


def _errors(out: Tensor, dense: Tensor, metric: str) -> Tensor:
    difference = (out - dense).transpose(0, 1).flatten(1)
    if metric == "absolute":
        return difference.abs().sum(1) / (out.shape[0] * out.shape[2])
    return difference.norm(dim=1) / dense.transpose(0, 1).flatten(1).norm(dim=1)
