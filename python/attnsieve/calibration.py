"""Which threshold skips which share of the tiles: a fit per model and phase, kept as JSON.

    calibration = Calibration.load("calibration.json")     # written by `attnsieve calibrate`
    scale = calibration.scale("prefill", 0.5)              # lambda = scale / keys of the sequence

The share of skipped tiles grows with the logarithm of the scale factor, so a phase is two numbers:
``scale = a * exp(b * share)``, as in BLASST (arXiv 2512.12087). The fit is of one model, one text
and the measured lengths: ``checks`` holds what the fitted factors really skipped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

import numpy

__all__ = ["PHASES", "Calibration", "Check", "PhaseFit", "Point", "fit"]

SCHEMA = 1
PHASES = ("prefill", "decode")
# Shares that a fit uses: outside, tiles that are never skipped and rounding decide.
FIT_SHARES = (0.1, 0.9)
# How far above the largest measured share a fit is trusted.
SHARE_MARGIN = 0.05


@dataclass(frozen=True)
class Point:
    """One measurement: ``share`` of the tiles skipped at ``scale / length``.

    The share is skipped over total tiles, both summed over layers and query heads (and in decode
    over steps), as the counters of :func:`attnsieve.threshold_attention` have them.
    """

    length: int
    scale: float
    share: float

    def __post_init__(self) -> None:
        _require_count("length", self.length)
        _require_positive("scale", self.scale)
        _require_share("share", self.share)


@dataclass(frozen=True)
class Check:
    """What the scale factor fitted for the share ``target`` skipped at one length."""

    length: int
    target: float
    scale: float
    share: float

    def __post_init__(self) -> None:
        _require_count("length", self.length)
        _require_share("target", self.target)
        _require_positive("scale", self.scale)
        _require_share("share", self.share)


@dataclass(frozen=True)
class PhaseFit:
    """``scale = a * exp(b * share)`` of one phase.

    Attributes:
        rms_log_scale: root mean square error of ``ln scale`` over the fitted points.
        max_share_error: largest distance of a fitted point's share from the curve.
        points: all measurements, those outside of ``FIT_SHARES`` included.
        checks: measurements at fitted factors.
    """

    a: float
    b: float
    rms_log_scale: float
    max_share_error: float
    points: tuple[Point, ...]
    checks: tuple[Check, ...] = ()

    def __post_init__(self) -> None:
        _require_positive("a", self.a)
        _require_positive("b", self.b)
        _require("rms_log_scale", self.rms_log_scale, _is_number(self.rms_log_scale), "a number")
        _require_share("max_share_error", self.max_share_error)
        _require("points", self.points, len(self.points) > 0, "at least one point")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Measured lengths, ascending."""
        return tuple(sorted({point.length for point in self.points}))

    @property
    def largest_share(self) -> float:
        return max(point.share for point in self.points)

    def scale(self, sparsity: float) -> float:
        """The factor that skips the share ``sparsity`` of the tiles."""
        if not (_is_number(sparsity) and 0 < sparsity < 1):
            raise ValueError(f"sparsity: expected a share in (0, 1), got {sparsity!r}")
        if sparsity > self.largest_share + SHARE_MARGIN:
            raise ValueError(
                f"sparsity: {sparsity:g} lies outside of the calibration, whose largest measured "
                f"share is {self.largest_share:.3f}"
            )
        return self.a * math.exp(self.b * sparsity)


@dataclass(frozen=True)
class Calibration:
    """The fits of one model.

    Attributes:
        model: its name. version: of the library that measured.
        skip_block: keys per tile. group_rows: query rows that share a decision in prefill.
        num_splits: visiting sequences of decode steps; with more of them less is skipped.
        phases: "prefill" and "decode", or one of them.
    """

    model: str
    version: str
    skip_block: int
    group_rows: int
    num_splits: int
    phases: Mapping[str, PhaseFit] = field(hash=False)

    def __post_init__(self) -> None:
        for name in ("model", "version"):
            value = getattr(self, name)
            _require(name, value, isinstance(value, str), "a text")
        _require_count("skip_block", self.skip_block)
        _require_count("group_rows", self.group_rows)
        _require_count("num_splits", self.num_splits)
        unknown = [name for name in self.phases if name not in PHASES]
        _require("phases", unknown, not unknown, f"none but {', '.join(PHASES)}")

    def scale(self, phase: str, sparsity: float) -> float:
        """The factor F of ``lambda = F / keys`` that skips the share ``sparsity`` of the tiles.

        Raises:
            ValueError: the phase has not been calibrated, or ``sparsity`` is not in (0, 1) or lies
                more than 0.05 above the largest share that was measured.
        """
        if phase not in self.phases:
            raise ValueError(
                f"phase: {phase!r} is not calibrated for {self.model}, only "
                f"{', '.join(self.phases) or 'nothing'}"
            )
        return self.phases[phase].scale(sparsity)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the calibration as JSON."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Calibration:
        """Reads what :meth:`save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not a calibration of this schema; the text names what is wrong.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            return _from_record(record)
        except ValueError as error:  # of JSON and of UTF-8 too
            raise ValueError(f"{path}: not a calibration: {error}") from error


def fit(points: Sequence[Point]) -> PhaseFit:
    """Least squares of ``ln scale`` over the share, all lengths together.

    Raises:
        ValueError: fewer than two different shares within ``FIT_SHARES``, or shares that do not
            grow with the scale.
    """
    low, high = FIT_SHARES
    used = [point for point in points if low <= point.share <= high]
    if len({point.share for point in used}) < 2:
        raise ValueError(
            f"points: {len(used)} of {len(points)} have shares in [{low}, {high}], a fit needs two "
            "different ones; choose other scales"
        )
    shares = numpy.array([point.share for point in used])
    logs = numpy.log([point.scale for point in used])
    b, log_a = numpy.polyfit(shares, logs, 1)
    if b <= 0:
        raise ValueError("points: the shares do not grow with the scale")
    return PhaseFit(
        a=float(numpy.exp(log_a)),
        b=float(b),
        rms_log_scale=float(numpy.sqrt(numpy.mean((log_a + b * shares - logs) ** 2))),
        max_share_error=float(min(1.0, numpy.max(numpy.abs((logs - log_a) / b - shares)))),
        points=tuple(points),
    )


def _from_record(record: Any) -> Calibration:
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"schema: expected {SCHEMA}, got {schema!r}")
    record = {name: value for name, value in record.items() if name != "schema"}
    phases = record.get("phases")
    if isinstance(phases, dict):
        record["phases"] = {name: _phase(value, f"phases.{name}") for name, value in phases.items()}
    elif "phases" in record:
        raise ValueError("phases: expected an object")
    return _build(Calibration, record)


def _phase(record: Any, where: str) -> PhaseFit:
    if isinstance(record, dict):
        record = dict(record)
        for name, kind in (("points", Point), ("checks", Check)):
            items = record.get(name, [])
            if not isinstance(items, list):
                raise ValueError(f"{where}.{name}: expected a list")
            if name in record:
                parts = (_build(kind, x, f"{where}.{name}[{i}]") for i, x in enumerate(items))
                record[name] = tuple(parts)
    return _build(PhaseFit, record, where)


def _build(kind: type, record: Any, where: str = ""):
    """An instance of a dataclass from a JSON object with exactly its fields."""
    prefix = f"{where}: " if where else ""
    if not isinstance(record, dict):
        raise ValueError(f"{prefix}expected an object, got {record!r}")
    names = {field.name for field in fields(kind)}
    for word, keys in (("missing", names - record.keys()), ("unknown", record.keys() - names)):
        if keys:
            raise ValueError(f"{prefix}{word} {', '.join(sorted(keys))}")
    try:
        return kind(**record)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _require(name: str, value: object, holds: bool, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")


def _require_positive(name: str, value: object) -> None:
    _require(name, value, _is_number(value) and value > 0, "a positive number")


def _require_count(name: str, value: object) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    _require(name, value, whole, "a positive integer")


def _require_share(name: str, value: object) -> None:
    _require(name, value, _is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
