"""Runs the test suites on the GPU at hand and records them as results/<gpu>/tests.json.

Usage: python bench/record_tests.py [pytest] [slow] [sanitizers] [--binary BENCH_ATTEND]

`pytest` runs the CUDA cases of tests/, `slow` those marked slow (large tensors, long repeats).
`sanitizers` runs the four tools of compute-sanitizer over small verified cases of the bench_attend
binary (no Python: minutes instead of hours); in Python memcheck over the small ops, memcheck and
racecheck over each op of the decode and estimate families. Rows of suites that are not run are
kept.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch

import results
from compare import device_name

SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# What the tools can say about bulk copies and warpgroup MMAs besides their usual checks.
HOPPER_FLAGS = {"memcheck": ["--check-bulk-copy", "yes", "--check-warpgroup-mma", "yes"]}
SANITIZER_FLAGS = {t: ["--error-exitcode", "1", *HOPPER_FLAGS.get(t, [])] for t in SANITIZER_TOOLS}
# Ragged lengths, GQA, every combination of mask, list and vote, all head dims, both dtypes.
SMALL = "--batch 2 --heads 4 --kv-heads 2 --seqlen-q 200 --seqlen-k 333 --iterations 1 --verify"
CASES = (
    f"{SMALL} --head-dim 64,96,128,256 --dtype bf16",
    f"{SMALL} --head-dim 64,96,128,256 --dtype fp16 --causal",
    f"{SMALL} --head-dim 64,96,128,256 --block-q 64,128 --block-k 16,64,128 --density 0.5",
    f"{SMALL} --head-dim 64,96,128 --causal --threshold 0.1",
    f"{SMALL} --head-dim 64,96,128 --block-q 64 --block-k 64,128 --density 0.5 --threshold 0.1",
)
PYTHON_OPS = ["tests/test_selection_block.py", "tests/test_empty.py", "-k", "cuda and not compile"]
# A few small cases of each op of the decode and estimate families, on each kernel family: chunks,
# clusters, ties, full buffers, entries and pages that do not exist. Below a minute for each tool.
DECODE_OPS = {
    "decode": (
        "tests/test_numerics_decode.py",
        "cuda and (slots or memory_safe or all_tokens or 1024)",
    ),
    "token selection": (
        "tests/test_selection_topk.py",
        "cuda and not oracle and (prefix or slots_come or overflow or (of_ties and 1-33))",
    ),
    "proxy_scores": (
        "tests/test_proxy_scores.py",
        "sm_80 and (memory_safe or softmax_mass or (bounds_in_pages and sm_80-64))",
    ),
    "append_kv": (
        "tests/test_append_kv.py",
        "sm_80 and (strides or projected or page_and_element or (steps_equal and dtype1-16))",
    ),
    "quantize_blocks": (
        "tests/test_quantize_blocks.py",
        "sm_80 and (special or empty or sequences or packed_codes)",
    ),
    "estimate_block_scores": (
        "tests/test_estimate_block_scores.py",
        "cuda and (masks or sampled or not_finite or overflow)",
    ),
    "fetch_tokens": ("tests/test_offload.py", "cuda and (rule or canonical)"),
    "threshold_decode": (
        "tests/test_threshold_decode_rules.py",
        "sm_80 and (dealt_in_turn or ragged or without_a_page or never_matters)",
    ),
}
DECODE_TOOLS = ("memcheck", "racecheck")
OWN_KERNELS = ["--kernel-name", "kernel_substring=attnsieve"]  # torch's are not ours to check
TIMEOUT_S = 500


def record(suite: str, passed: int, failed: int, skipped: int, seconds: float) -> dict:
    """One row of tests.json."""
    row = {
        "suite": suite,
        "device": torch.cuda.get_device_name(),
        "passed": passed,
        "failed": failed,
        "skipped": skipped,
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
        "date": results.today(),
        "kernel_hash": results.current_hash(),
    }
    print(row, flush=True)
    return row


def _pytest_counts(text: str) -> tuple[int, int, int]:
    def count(word: str) -> int:
        found = re.findall(rf"(\d+) {word}", text)
        return int(found[-1]) if found else 0

    return count("passed"), count("failed") + count("error"), count("skipped")


def pytest_cuda(workers: int, marker: str | None = None) -> dict:
    """The CUDA cases of the test suite; more than one worker needs pytest-xdist."""
    options = ["-k", "cuda"] + (["-m", marker] if marker else [])
    command = [sys.executable, "-m", "pytest", "tests", *options, "-p", "no:cacheprovider"]
    if workers > 1:
        command += ["-n", str(workers)]
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=results.ROOT, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    print(done.stdout[-5000:], done.stderr[-2000:], flush=True)
    passed, failed, skipped = _pytest_counts(done.stdout)
    suite = " ".join(["pytest", *options])
    return record(suite, passed, failed, skipped, time.perf_counter() - start)


def _sanitize(tool: str, command: list[str], flags: Sequence[str] = ()) -> bool:
    # Without the caching allocator, every tensor is an allocation that memcheck can see the end of.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    name = f"# {tool}: {' '.join(command)}"
    try:
        done = subprocess.run(
            ["compute-sanitizer", "--tool", tool, *SANITIZER_FLAGS[tool], *flags, *command],
            cwd=results.ROOT,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        print(f"{name}\nnot done after {TIMEOUT_S} s")
        return False
    if done.returncode != 0:
        print(f"{name}\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return done.returncode == 0


def sanitized_tests(tool: str, what: str, tests: Sequence[str], flags: Sequence[str] = ()) -> dict:
    """The row of one tool over tests, which pass or fail together."""
    start = time.perf_counter()
    clean = _sanitize(tool, [sys.executable, "-m", "pytest", *tests], flags)
    suite = f"compute-sanitizer {tool}, {what}"
    return record(suite, int(clean), int(not clean), 0, time.perf_counter() - start)


def sanitized_binary(tool: str, binary: Path) -> dict:
    """The row of one tool over the cases of bench_attend."""
    start = time.perf_counter()
    passed = [_sanitize(tool, [str(binary), *case.split()]) for case in CASES]
    suite = f"compute-sanitizer {tool}, bench_attend"
    failed = len(passed) - sum(passed)
    return record(suite, sum(passed), failed, 0, time.perf_counter() - start)


def sanitizers(binary: Path, workers: int) -> Iterator[dict]:
    """Rows of compute-sanitizer over attend, the small ops and the decode family, as they end."""
    jobs = [partial(sanitized_binary, tool, binary) for tool in SANITIZER_TOOLS]
    jobs.append(partial(sanitized_tests, "memcheck", "selection and empty tests", PYTHON_OPS))
    for op, (file, chosen) in DECODE_OPS.items():
        for tool in DECODE_TOOLS:
            tests = [file, "-k", chosen]
            jobs.append(partial(sanitized_tests, tool, f"{op} tests", tests, OWN_KERNELS))
    with ThreadPoolExecutor(workers) as pool:
        for done in as_completed([pool.submit(job) for job in jobs]):
            yield done.result()


def keep(path: Path, row: dict) -> None:
    """Write ``row`` into the file at ``path``, in place of an older one of its suite."""
    rows = results.read(path) if path.exists() else []
    suites = [old["suite"] for old in rows]
    at = suites.index(row["suite"]) if row["suite"] in suites else len(rows)
    rows[at : at + 1] = [row]
    results.write(path, rows)


def _suites(args: argparse.Namespace) -> Iterator[dict]:
    if "pytest" in args.suite:
        yield pytest_cuda(args.workers)
    if "slow" in args.suite:
        yield pytest_cuda(args.workers, "slow")
    if "sanitizers" in args.suite:
        yield from sanitizers(args.binary.resolve(), args.workers)


def main() -> int:
    """Run what was asked for and merge it into tests.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", nargs="*", default=["pytest", "sanitizers"])
    parser.add_argument("--binary", type=Path, default=Path("build/bench/bench/bench_attend"))
    parser.add_argument(
        "--workers", type=int, default=1, help="parallel processes of tests or tools"
    )
    parser.add_argument("--out", type=Path, help="folder of tests.json")
    args = parser.parse_args()
    path = (args.out or results.RESULTS / device_name("cuda")) / "tests.json"
    failed = 0
    for row in _suites(args):  # one by one: what has run stays recorded if a later suite is killed
        keep(path, row)
        failed += row["failed"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
