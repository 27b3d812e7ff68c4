"""Lists results files that were measured with other kernels than this tree's. Exit code 1 if any.

Usage: python bench/freshness.py
"""

from __future__ import annotations

import sys

import results


def main() -> int:
    """Compare every row's kernel_hash with the hash of the tree."""
    current = results.current_hash()
    stale = 0
    for path in sorted(results.RESULTS.rglob("*.json")):
        content = results.read(path)
        rows = content if isinstance(content, list) else [content]
        hashes = {row.get("kernel_hash") for row in rows}
        if hashes - {current}:
            stale += 1
            found = ", ".join(sorted(str(h) for h in hashes))
            print(f"{path.relative_to(results.ROOT)}: measured with {found}, current is {current}")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
