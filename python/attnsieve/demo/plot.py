"""The demo's picture: quality and speed of prefill over density, of decode steps over budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attnsieve.demo.decode import DECODE_FAMILIES, DENSE_DECODE, TWO_PHASE, DecodeResult
from attnsieve.demo.measure import Result
from attnsieve.demo.plan import DENSE, FAMILIES, SDPA

# Okabe-Ito colours, readable with colour-blindness and in grey, two of Tol's and grey where they
# run out, and a marker per family.
STYLES = {
    FAMILIES["topk"]: ("#D55E00", "o"),
    FAMILIES["topp"]: ("#0072B2", "s"),
    FAMILIES["sale"]: ("#000000", "*"),
    FAMILIES["xattention"]: ("#CC79A7", "v"),
    FAMILIES["spargeattn"]: ("#E69F00", "P"),
    FAMILIES["threshold"]: ("#009E73", "^"),
    FAMILIES["oracle"]: ("#7F7F7F", "D"),
}
DECODE_STYLES = {
    DECODE_FAMILIES["quest"]: ("#D55E00", "o"),
    DECODE_FAMILIES["tidaldecode"]: ("#0072B2", "s"),
    DECODE_FAMILIES["delta"]: ("#009E73", "^"),
    DECODE_FAMILIES["recycled"]: ("#CC79A7", "v"),
    DECODE_FAMILIES["tokenselect"]: ("#E69F00", "D"),
    DECODE_FAMILIES["lowrank"]: ("#F0E442", "*"),
    DECODE_FAMILIES["fasa"]: ("#7F7F7F", "<"),
    DECODE_FAMILIES["squeezed"]: ("#882255", "h"),
    DECODE_FAMILIES["triattention"]: ("#332288", "v"),
    DECODE_FAMILIES["threshold"]: ("#56B4E9", "P"),
    TWO_PHASE: ("#000000", "X"),
}
DASHES = ("-", "--", ":", "-.")


def write_plot(
    path: Path, title: str, results: Sequence[Result], decoded: Sequence[DecodeResult] = ()
) -> None:
    """Two panels over density, and two over the budget of decode steps where there are any.

    The type of the file is ``path``'s suffix.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = 2 if decoded else 1
    figure, panels = pyplot.subplots(
        rows, 2, figsize=(10, 4 * rows), layout="constrained", squeeze=False
    )
    _draw_prefill(*panels[0], results)
    if decoded:
        _draw_decode(*panels[1], decoded)
    for quality, _ in panels:
        if quality.get_legend_handles_labels()[0]:
            quality.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_prefill(quality, speed, results: Sequence[Result]) -> None:
    dense = next(result for result in results if result.method == DENSE)
    for name, look in STYLES.items():
        rows = sorted((r for r in results if r.method == name), key=lambda r: r.density)
        if not rows:
            continue
        densities = [row.density for row in rows]
        _line(quality, densities, [row.perplexity for row in rows], name, look)
        # The oracle's time leaves its selection out: a speed-up nobody can have.
        if name != FAMILIES["oracle"]:
            _line(speed, densities, [row.speedup_vs_dense for row in rows], name, look)
    _frame(quality, "perplexity (lower is better)", dense.perplexity, "dense")
    _frame(speed, "attention speed-up over dense (attnsieve)", 1.0, "dense")
    for axes in (quality, speed):
        axes.set_xlim(0, 1)
        axes.set_xlabel("density (kept share of causal query-key pairs)")
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


def _draw_decode(quality, speed, decoded: Sequence[DecodeResult]) -> None:
    dense = next(result for result in decoded if result.method == DENSE_DECODE)
    sparse = (result for result in decoded if result.method != DENSE_DECODE)
    names = dict.fromkeys(result.method for result in sparse)
    ranks = [name for name in names if name not in DECODE_STYLES]  # of LowRank, a dash each
    for name in names:
        rows = sorted((r for r in decoded if r.method == name), key=lambda r: r.keys)
        keys = [row.keys for row in rows]
        look = DECODE_STYLES.get(name, DECODE_STYLES[DECODE_FAMILIES["lowrank"]])
        dash = DASHES[ranks.index(name) % len(DASHES)] if name in ranks else DASHES[0]
        _line(quality, keys, [row.perplexity for row in rows], name, look, dash)
        _line(speed, keys, [row.speedup_vs_dense for row in rows], name, look, dash)
    rate = f"dense, {dense.tokens_per_s:.1f} tokens/s"
    _frame(quality, "perplexity of decode steps", dense.perplexity, "dense")
    _frame(speed, "tokens per second over dense decode", 1.0, rate)
    for axes in (quality, speed):
        axes.set_xlim(left=0)
        axes.set_xlabel("keys that a sparse layer keeps (thresholds: on average)")
    speed.set_ylim(bottom=0)


def _line(
    axes,
    x: Sequence[float],
    y: Sequence[float],
    name: str,
    look: tuple[str, str],
    dash: str = DASHES[0],
) -> None:
    colour, marker = look
    style = dict(color=colour, marker=marker, linestyle=dash, linewidth=1.5, markersize=6)
    axes.plot(x, y, label=name, **style)


def _frame(axes, label: str, level: float, text: str) -> None:
    """Grid, y label, and a dashed line at the ``level`` of the dense row."""
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
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel(label)
