"""Rewrites the generated parts of README.md, or checks that they are current.

Usage: python tools/readme_tables.py [--check]

Between `<!-- NAME:begin -->` and `<!-- NAME:end -->`:
capability from attnsieve.capabilities(); results, demo and tests from bench/results/<gpu>/*.json.
Every row of a results file is shown, the slower ones marked. With --check the exit code is 1 where
README.md differs from what would be written.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
NOTHING = "Nothing has been recorded yet."
# Other times of ours that a row may carry, and the column of their ratio.
OWN_DENSE = "attnsieve-dense"  # a peer of the threshold suites
OWN_TIMES = {"ours_dense_ms": "our dense / ours", "ours_block128_ms": "our block128 / ours"}
PARTS = {"estimate_ms": "estimate ms", "select_ms": "select ms", "attend_ms": "attend ms"}


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are right-aligned numbers or short words."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    lines = [columns, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def capability() -> str:
    """Ops, backends and what each serves."""
    import attnsieve

    lines = ["| op | backend | supported | features |", "|---|---|---|---|"]
    for row in attnsieve.capabilities():
        cells = (f"`{row['op']}`", row["backend"], row["supported"], row["features"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def files(pattern: str) -> list[tuple[Path, list | dict]]:
    """Results files and their contents, GPUs before the CPU."""
    paths = sorted(RESULTS.glob(f"*/{pattern}"), key=lambda path: (path.parent.name == "cpu", path))
    return [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits without an exponent, as far as thousands."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def origin(path: Path, rows: list[dict]) -> str:
    """Device, command, date and versions of one results file."""
    suite = path.stem
    command = f"python bench/compare.py {suite}"
    if suite.startswith("bench_"):
        command = f"{suite} --json {path.name}"
    parts = [f"**{rows[0]['device']}**", f"`{command}`"]
    for name, key in (("", "date"), ("torch ", "torch"), ("kernels ", "kernel_hash")):
        values = sorted({str(row[key]) for row in rows if row.get(key)})
        if values:
            parts.append(name + ", ".join(values))
    return ", ".join(parts)


def best_peer(row: dict) -> tuple[str, float] | None:
    """Name and milliseconds of the quickest peer; our dense kernel where that is the yardstick."""
    peers = row.get("peers") or {}
    if OWN_DENSE in peers:
        return OWN_DENSE, peers[OWN_DENSE]
    return min(peers.items(), key=lambda item: item[1]) if peers else None


def beside_dense(row: dict) -> bool:
    """Whether cuDNN's time stands beside that of our own dense kernel."""
    peers = row.get("peers") or {}
    return OWN_DENSE in peers and "cudnn" in peers


def ratio_text(value: float | None) -> str:
    """Below 1 is bold."""
    if value is None:
        return ""
    return f"{value:.2f}" if value >= 1 else f"**{value:.2f}**"


def result_cells(row: dict) -> list[str]:
    """One case as the texts of a table row; a ratio below 1 is a loss and bold."""
    best = best_peer(row)
    peer, value = "", None
    if best is not None:
        peer = f"{best[0]} {number(best[1])}"
        value = row.get("ratio_best_peer") or best[1] / row["ours_ms"]
    return [
        row["case"],
        row.get("dtype", ""),
        number(row["ours_ms"]),
        number(row.get("tf")),
        peer,
        ratio_text(value),
        skipped(row),
        ratio_text(row["peers"]["cudnn"] / row["ours_ms"] if beside_dense(row) else None),
        *(ratio_text(row[key] / row["ours_ms"] if key in row else None) for key in OWN_TIMES),
        *(number(row.get(key)) for key in PARTS),
    ]


def losses(rows: list[dict]) -> str:
    """How often a peer, or our own dense kernel, was quicker."""
    with_peer = [row for row in rows if best_peer(row) is not None]
    lost = [row for row in with_peer if best_peer(row)[1] < row["ours_ms"]]
    texts = []
    if with_peer:
        texts.append(f"The best peer was quicker in {len(lost)} of {len(with_peer)} cases.")
    dense = [row for row in rows if row.get("ours_dense_ms") is not None]
    if dense:
        slower = [row for row in dense if row["ours_dense_ms"] < row["ours_ms"]]
        texts.append(f"Our own dense kernel was quicker in {len(slower)} of {len(dense)}.")
    return " ".join(texts)


def results() -> str:
    """One table for each results file."""
    columns = ("case", "dtype", "ms", "TF", "best peer, ms", "peer / ours")
    columns = (*columns, "skipped", "cuDNN / ours", *OWN_TIMES.values(), *PARTS.values())
    parts = []
    for path, rows in files("*.json"):
        if path.stem in ("demo", "tests") or not rows:
            continue
        body = [result_cells(row) for row in rows]
        shown = [place for place in range(len(columns)) if any(cells[place] for cells in body)]
        parts.append(
            "\n\n".join(
                text
                for text in (
                    origin(path, rows),
                    losses(rows),
                    table(
                        [columns[place] for place in shown],
                        ([cells[place] for place in shown] for cells in body),
                    ),
                )
                if text
            )
        )
    return "\n\n".join(parts) or NOTHING


def demo() -> str:
    """The demo's tables, as its --json option wrote them."""
    parts = []
    numbers = ("density", "skipped", "perplexity", "attention ms", "select", "vs dense", "vs SDPA")
    for _, run in files("demo.json"):
        title = (
            f"**{run['device']}**, `python -m attnsieve demo`: {run['model']}, {run['length']} "
            f"tokens, {run['dtype']}, {run['layers']} layers, torch {run['torch']}, {run['date']}"
        )
        body = (
            (
                row["method"],
                row["budget"],
                f"{row['density']:.3f}",
                skipped(row),
                f"{row['perplexity']:.2f}",
                number(row["attention_ms"]),
                select_share(row),
                f"{row['speedup_vs_dense']:.2f}",
                f"{row['speedup_vs_sdpa']:.2f}",
            )
            for row in run["rows"]
        )
        parts.append(f"{title}\n\n{table(('method', 'budget', *numbers), body)}")
        if run.get("decode_rows"):
            parts.append(decode_steps(run))
    return "\n\n".join(parts) or NOTHING


def select_share(row: dict) -> str:
    """The share of the attention time that finds blocks, empty in rows that look for none."""
    return f"{row['select_ms'] / row['attention_ms']:.2f}" if row["select_ms"] else ""


def skipped(row: dict) -> str:
    """The share of tiles that a threshold skipped, empty in rows without one."""
    return f"{row['skipped']:.3f}" if row.get("skipped") is not None else ""


def decode_steps(run: dict) -> str:
    """The decode rows of one demo run."""
    numbers = ("perplexity", "attention ms", "tokens/s", "vs dense")
    columns = ("decode method", "budget", "skipped", *numbers)
    body = (
        (
            row["method"],
            row["budget"],
            skipped(row),
            f"{row['perplexity']:.2f}",
            number(row["attention_ms"]),
            number(row["tokens_per_s"]),
            f"{row['speedup_vs_dense']:.2f}",
        )
        for row in run["decode_rows"]
    )
    title = f"The same run, {run['decode_tokens']} decode steps at batch 1 (times per token):"
    return f"{title}\n\n{table(columns, body)}"


def tests() -> str:
    """Recorded runs of the test suite and of the sanitizers."""
    rows = [row for _, found in files("tests.json") for row in found]
    if not rows:
        return NOTHING
    keys = ("suite", "device", "passed", "failed", "skipped", "seconds", "kernel_hash")
    columns = ("suite", "device", "passed", "failed", "skipped", "seconds", "kernels")
    return table(columns, ([str(row.get(key, "")) for key in keys] for row in rows))


SECTIONS = {"capability": capability, "results": results, "demo": demo, "tests": tests}


def rewritten(text: str) -> str:
    """README with every generated part replaced. Raises ValueError where a marker is missing."""
    for name, section in SECTIONS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{README.name}: expected one {begin} ... {end}")
        replacement = f"{begin}\n\n{section()}\n\n{end}"
        text = pattern.sub(lambda _, new=replacement: new, text)
    return text


def main() -> int:
    """Writes README.md, or with --check compares it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = rewritten(old)
    if not options.check:
        README.write_text(new, encoding="utf-8")
        return 0
    if old != new:
        print("README.md: run python tools/readme_tables.py", file=sys.stderr)
        return 1
    print("README.md is current")
    return 0


if __name__ == "__main__":
    sys.exit(main())
