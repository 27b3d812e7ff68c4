"""Progress, table and JSON of the demo; rich where it is installed, plain text elsewhere."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from attnsieve.demo.decode import DecodeResult
from attnsieve.demo.measure import Result

COLUMNS = (
    "method",
    "budget",
    "density",
    "skipped",
    "ppl",
    "attn ms",
    "select",
    "vs dense",
    "vs SDPA",
)
DECODE_COLUMNS = (
    "method",
    "budget",
    "skipped",
    "ppl",
    "attn ms",
    "all ms",
    "tokens/s",
    "vs dense",
)


def _has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yields ``step(text)``, which announces the next of ``total`` pieces of work on stderr."""
    if _has_rich() and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
            task = bar.add_task("", total=total)
            begun = False

            def step(text: str) -> None:
                nonlocal begun
                bar.update(task, description=text, advance=1 if begun else 0)
                begun = True

            yield step
    else:
        done = 0

        def step(text: str) -> None:
            nonlocal done
            done += 1
            print(f"[{done}/{total}] {text}", file=sys.stderr, flush=True)

        yield step


def cells(result: Result) -> tuple[str, ...]:
    """A result as the texts of one table row."""
    return (
        result.method,
        result.budget,
        f"{result.density:.3f}",
        _share(result.skipped),
        f"{result.perplexity:.3f}",
        _milliseconds(result.attention_ms),
        _share(result.select_ms / result.attention_ms if result.select_ms else None),
        f"{result.speedup_vs_dense:.2f}x",
        f"{result.speedup_vs_sdpa:.2f}x",
    )


def decode_cells(result: DecodeResult) -> tuple[str, ...]:
    """A decode result as the texts of one table row."""
    return (
        result.method,
        result.budget,
        _share(result.skipped),
        f"{result.perplexity:.3f}",
        _milliseconds(result.attention_ms),
        _milliseconds(result.total_ms),
        f"{result.tokens_per_s:.1f}",
        f"{result.speedup_vs_dense:.2f}x",
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    notes: Sequence[str],
    left: int = 2,
) -> None:
    """A table and its notes on stdout; the first ``left`` columns are left-aligned."""
    if _has_rich():
        from rich import box
        from rich.console import Console
        from rich.table import Table

        # Without padding the columns fit a terminal of 80.
        table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
        for place, column in enumerate(columns):
            table.add_column(column, justify="left" if place < left else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console = Console()
        console.print(title, highlight=False)
        console.print(table)
    else:
        lines = [columns, *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print(title)
        for row in lines:
            texts = (
                text.ljust(width) if place < left else text.rjust(width)
                for place, (text, width) in enumerate(zip(row, widths, strict=True))
            )
            print("  ".join(texts).rstrip())
    for note in notes:
        print(f"  {note}")


def write_json(
    path: Path, settings: dict, results: Sequence[Result], decoded: Sequence[DecodeResult]
) -> None:
    """``settings``, the rows and the decode rows, where there are any, as one JSON object."""
    record = {**settings, "rows": [result.as_dict() for result in results]}
    if decoded:
        record["decode_rows"] = [result.as_dict() for result in decoded]
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
