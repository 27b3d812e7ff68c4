"""Reading and writing of bench/results/<gpu>/<name>.json: lists of flat objects."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

sys.path.insert(0, str(ROOT / "tools"))
from kernel_hash import kernel_hash  # noqa: E402  (tools/ is no package)


def current_hash() -> str:
    """Hash of the compiled sources of this tree."""
    return kernel_hash(ROOT)


def today() -> str:
    """ISO date of the run."""
    return datetime.date.today().isoformat()


def read(path: Path) -> list[dict]:
    """The rows of one results file."""
    return json.loads(path.read_text())


def write(path: Path, rows: list[dict]) -> None:
    """One row a line, so that diffs show what moved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
