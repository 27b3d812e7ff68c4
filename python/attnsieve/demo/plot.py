"""The demo's picture: perplexity and speed-up against density."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attnsieve.demo.measure import Result
from attnsieve.demo.plan import DENSE, FAMILIES, SDPA

# Okabe-Ito colours, readable with colour-blindness and in grey, and a marker per family.
STYLES = {
    FAMILIES["topk"]: ("#D55E00", "o"),
    FAMILIES["topp"]: ("#0072B2", "s"),
    FAMILIES["threshold"]: ("#009E73", "^"),
    FAMILIES["oracle"]: ("#7F7F7F", "D"),
}


def write_plot(path: Path, title: str, results: Sequence[Result]) -> None:
    """Two panels over one density axis, as a file whose type is ``path``'s suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dense = next(result for result in results if result.method == DENSE)
    figure, (quality, speed) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, (colour, marker) in STYLES.items():
        rows = sorted((r for r in results if r.method == name), key=lambda r: r.density)
        if not rows:
            continue
        style = dict(color=colour, marker=marker, linewidth=1.5, markersize=6, label=name)
        densities = [row.density for row in rows]
        quality.plot(densities, [row.perplexity for row in rows], **style)
        # The oracle's time leaves its selection out: a speed-up nobody can have.
        if name != FAMILIES["oracle"]:
            speed.plot(densities, [row.speedup_vs_dense for row in rows], **style)
    for axes, level, text in ((quality, dense.perplexity, "dense"), (speed, 1.0, "dense")):
        axes.axhline(level, color="black", linewidth=0.8, linestyle="--")
        axes.annotate(
            text,
            (1.0, level),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
        axes.set_xlim(0, 1)
        axes.set_xlabel("density (kept share of causal query-key pairs)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    sdpa = next(result for result in results if result.method == SDPA)
    ratio = dense.attention_ms / sdpa.attention_ms
    speed.axhline(ratio, color="black", linewidth=0.8, linestyle=":")
    speed.annotate(
        "torch SDPA",
        (0.0, ratio),
        xytext=(3, 3),
        textcoords="offset points",
        fontsize=8,
    )
    speed.set_ylim(bottom=0)
    quality.set_ylabel("perplexity (lower is better)")
    speed.set_ylabel("attention speed-up over dense (attnsieve)")
    if quality.get_legend_handles_labels()[0]:
        quality.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
