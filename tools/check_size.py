"""File-size budget and forbidden constructs over the sources of this tree.

Usage: python tools/check_size.py

Warns above 400 lines, fails above 800; fails on launches outside the launch helper, on process
exits, printing and device-wide synchronisation inside the library, and on leftover work markers.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WARN_LINES = 400
MAX_LINES = 800
FOLDERS = ("include", "cuda", "cpu", "python", "tests", "bench", "tools")
SUFFIXES = (".py", ".cu", ".cuh", ".h", ".cpp")
LIBRARY = ("include/", "cuda/", "cpu/", "python/bindings/")
LAUNCH_HELPER = "cuda/common/launch.cuh"

LAUNCH = re.compile(r"<<<")
LEAVES_OR_BLOCKS = re.compile(r"\b(exit|f?printf|cudaDeviceSynchronize)\s*\(")
MARKER = re.compile(r"\b(TODO|FIXME)\b")


def sources() -> list[str]:
    """Every source file of the folders that hold code, relative to the root."""
    paths = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    return sorted(path.relative_to(ROOT).as_posix() for path in paths if path.suffix in SUFFIXES)


def problems_of(name: str, lines: list[str]) -> list[str]:
    """One text per broken rule of one file."""
    problems = []
    if len(lines) > MAX_LINES:
        problems.append(f"{name}: {len(lines)} lines, more than {MAX_LINES}")
    rules = []
    if not name.endswith(".py") and name != LAUNCH_HELPER:
        rules.append((LAUNCH, f"kernels are launched in {LAUNCH_HELPER} only"))
    if name.startswith(LIBRARY):
        rules.append((LEAVES_OR_BLOCKS, "a library throws, it does not exit, print or block"))
    if ROOT / name != Path(__file__).resolve():
        rules.append((MARKER, "open work belongs into the issues"))
    for number, line in enumerate(lines, 1):
        for pattern, reason in rules:
            if pattern.search(line):
                problems.append(f"{name}:{number}: {pattern.search(line)[0]}: {reason}")
    return problems


def main() -> int:
    """Prints warnings and problems; returns 1 if there is a problem."""
    failed = False
    names = sources()
    for name in names:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        if WARN_LINES < len(lines) <= MAX_LINES:
            print(f"warning: {name}: {len(lines)} lines, the budget is {WARN_LINES}")
        for problem in problems_of(name, lines):
            print(problem, file=sys.stderr)
            failed = True
    print(f"{len(names)} files checked")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
