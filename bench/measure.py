"""Timers of compare.py and the row that every suite writes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from statistics import median

import torch

import results

Run = Callable[[], object]


def device_name(device: str) -> str:
    """Folder name of a device's results: h100, h200, cpu ..."""
    if device == "cpu":
        return "cpu"
    words = torch.cuda.get_device_name().lower().replace("-", " ").split()
    return next((w for w in words if any(c.isdigit() for c in w)), words[-1])


def time_gpu(run: Run) -> float:
    """Median milliseconds with a cold L2."""
    from triton.testing import do_bench

    return do_bench(run, warmup=50, rep=300, return_mode="median")


def time_interleaved(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Median milliseconds of each run, taken in turns so that drift hits all alike (CPU)."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: median(values) for name, values in samples.items()}


def row(
    op: str,
    case: str,
    device: str,
    ours_ms: float,
    peer_ms: dict[str, float],
    *,
    pairs: float = 0,
    head_dim: int = 0,
    density: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
    shape: Iterable[int] = (),
    **extra: float,
) -> dict:
    """One result in the common format."""
    best = min(peer_ms.values()) if peer_ms else None
    result = {
        "op": op,
        "case": case,
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "ours_ms": round(ours_ms, 5),
        "peers": {name: round(ms, 5) for name, ms in peer_ms.items()},
        "tf": round(4 * head_dim * pairs / ours_ms / 1e9, 4) if pairs else None,
        "density": density,
        "ratio_best_peer": round(best / ours_ms, 3) if best else None,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
        "torch": torch.__version__,
        "date": results.today(),
        "kernel_hash": results.current_hash(),
        **extra,
    }
    times = " ".join(f"{name}={ms:.4f}" for name, ms in peer_ms.items())
    print(f"{case:<48} ours={ours_ms:.4f} ms tf={result['tf']} {times}", flush=True)
    return result


def timed_peers(runs: dict[str, Run]) -> dict[str, float]:
    """Time every peer; one that refuses the case is named and left out."""
    times = {}
    for name, run in runs.items():
        try:
            times[name] = time_gpu(run)
        except Exception as error:  # a peer's refusal is not our failure
            print(f"# {name} refuses: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
    return times


def call_us(run: Run, calls: int = 200) -> float:
    """Median host microseconds of one call. Few enough in a row that no launch queue fills up."""
    samples = []
    for _ in range(25):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        samples.append((time.perf_counter() - start) / calls * 1e6)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return median(samples)


def import_s(statement: str) -> float:
    """Median seconds that a new process takes from before `statement` to after it."""
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
        for _ in range(5)
    ]
    return median(runs)
