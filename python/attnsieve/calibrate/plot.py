"""The calibration's picture: skipped share, output error and perplexity over the scale factor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from attnsieve.calibrate.sweep import Sample, Sweep
from attnsieve.calibration import FIT_SHARES

PANELS = {
    "share": "skipped share of tiles",
    "error": "relative error of attention outputs",
    "perplexity": "perplexity (dashed: dense)",
}
# Okabe-Ito colours, readable with colour-blindness and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "v", "D", "P")


def write_plot(path: Path, title: str, sweeps: Mapping[str, Sweep]) -> None:
    """A row of three panels per phase, a line per length. The type of the file is its suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        len(sweeps), 3, figsize=(13, 4 * len(sweeps)), layout="constrained", squeeze=False
    )
    for panels, (phase, sweep) in zip(rows, sweeps.items(), strict=True):
        for axes, (name, label) in zip(panels, PANELS.items(), strict=True):
            _draw(axes, name, sweep.samples)
            axes.set_xscale("log")
            axes.set_xlabel(f"{phase}: scale factor F (threshold = F / keys)")
            axes.set_ylabel(label)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        fit, low = sweep.fit, FIT_SHARES[0]
        high = min(fit.largest_share, FIT_SHARES[1])
        panels[0].plot(
            [fit.a * math.exp(fit.b * share) for share in (low, high)],
            [low, high],
            color="black",
            linewidth=0.8,
            linestyle="--",
            label=f"F = {fit.a:.3g} exp({fit.b:.3g} S)",
        )
        panels[0].set_ylim(0, 1)
        panels[0].legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw(axes, name: str, samples: Sequence[Sample]) -> None:
    for place, length in enumerate(sorted({sample.length for sample in samples})):
        colour = COLOURS[place % len(COLOURS)]
        rows = sorted((x for x in samples if x.length == length), key=lambda x: x.scale)
        dense, *skipping = rows
        axes.plot(
            [sample.scale for sample in skipping],
            [getattr(sample, name) for sample in skipping],
            color=colour,
            marker=MARKERS[place % len(MARKERS)],
            linewidth=1.5,
            markersize=5,
            label=f"{length} tokens",
        )
        if name == "perplexity":
            axes.axhline(dense.perplexity, color=colour, linewidth=0.8, linestyle="--")
