"""Times our ops beside the peers: same tensors, same process, interleaved where it matters.

Usage: python bench/compare.py SUITE [SUITE ...] [--out DIR] [--quick]
Suites: dense, sparse, select, overhead (GPU); cpu, cpu-overhead (CPU).

Writes DIR/<suite>.json (default bench/results/<gpu or cpu>). TF counts kept query-key pairs:
4 * head_dim * pairs / time. GPU times are medians of CUDA events with a cold L2 (triton do_bench).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch

import attnsieve
import peers
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


def random_lists(heads: int, n_q: int, n_k: int, kept: int) -> torch.Tensor:
    """int32 [1, heads, n_q, kept] of sorted unique KV block ids, drawn head by head."""
    rows = [
        torch.rand(n_q, n_k, device="cuda").argsort(-1)[:, :kept].sort(-1).values.int()
        for _ in range(heads)
    ]
    return torch.stack(rows)[None].contiguous()


def timed_peers(runs: dict[str, Run]) -> dict[str, float]:
    """Time every peer; one that refuses the case is named and left out."""
    times = {}
    for name, run in runs.items():
        try:
            times[name] = time_gpu(run)
        except Exception as error:  # a peer's refusal is not our failure
            print(f"# {name} refuses: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
    return times


def dense(quick: bool) -> list[dict]:
    """Dense forward at 16k tokens in all."""
    rows = []
    for d, h in ((128, 16), (64, 32)):
        for length in (4096, 16384) if quick else (4096, 16384, 32768):
            b = max(1, 16384 // length)
            q, k, v = (
                torch.randn(b, h, length, d, device="cuda", dtype=torch.bfloat16) for _ in range(3)
            )
            for causal in (False, True):
                ours = time_gpu(lambda: attnsieve.block_sparse_attention(q, k, v, causal=causal))
                rows.append(
                    row(
                        "attend",
                        f"dense d{d} L{length} causal{int(causal)}",
                        "cuda",
                        ours,
                        timed_peers(peers.dense(q, k, v, causal)),
                        pairs=b * h * length * length * (0.5 if causal else 1),
                        head_dim=d,
                        shape=q.shape,
                    )
                )
    return rows


def sparse(quick: bool) -> list[dict]:
    """Random block lists at 32k, with our own dense time beside them."""
    rows = []
    length = 32768
    for h, d in ((16, 128), (32, 64)):
        q, k, v = (
            torch.randn(1, h, length, d, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        )
        dense_ms = time_gpu(lambda: attnsieve.block_sparse_attention(q, k, v))
        for block_q, block_k in ((128, 128), (128, 64), (64, 64)):
            name = f"block{block_q}" if block_q == block_k else f"block{block_q}x{block_k}"
            n_q, n_k = length // block_q, length // block_k
            for density in (0.25, 0.1) if quick else (1.0, 0.5, 0.25, 0.1, 0.05):
                torch.manual_seed(0)
                kept = max(2, int(n_k * density))
                lists = random_lists(h, n_q, n_k, kept)
                counts = torch.full((1, h, n_q), kept, device="cuda", dtype=torch.int32)
                index = attnsieve.BlockIndex(counts, lists, block_q, block_k)
                ours = time_gpu(lambda: attnsieve.block_sparse_attention(q, k, v, index))
                rows.append(
                    row(
                        "attend",
                        f"sparse d{d} L{length} h{h} {name} density{density}",
                        "cuda",
                        ours,
                        timed_peers(peers.block_sparse(q, k, v, lists, block_q, block_k)),
                        pairs=h * n_q * kept * block_q * block_k,
                        head_dim=d,
                        density=density,
                        shape=q.shape,
                        ours_dense_ms=round(dense_ms, 5),
                    )
                )
    return rows


def select(quick: bool) -> list[dict]:
    """Pooling and selection at 32k and 128k; torch.topk over the same scores beside it."""
    rows = []
    for length, h in ((32768, 32),) if quick else ((32768, 32), (131072, 32)):
        q = torch.randn(1, h, length, 128, device="cuda", dtype=torch.bfloat16)
        k = torch.randn(1, 8, length, 128, device="cuda", dtype=torch.bfloat16)
        scores = attnsieve.pooled_block_scores(q, k)
        budget = scores.shape[-1] // 10
        pool_ms = time_gpu(lambda: attnsieve.pooled_block_scores(q, k))
        for name, rule in (("topk", {"topk": budget}), ("topp", {"top_p": 0.5})):
            ours = time_gpu(
                lambda: attnsieve.select_from_scores(scores, length, length, causal=True, **rule)
            )
            peer = {"torch.topk": time_gpu(lambda: torch.topk(scores, budget))}
            rows.append(
                row(
                    "select_blocks",
                    f"select {name} L{length} h{h} block64",
                    "cuda",
                    ours,
                    peer,
                    density=0.1,
                    dtype=torch.float32,
                    shape=scores.shape,
                    pool_ms=round(pool_ms, 5),
                )
            )
    return rows


def _call_us(run: Run, calls: int = 200) -> float:
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


def _import_s(statement: str) -> float:
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
        for _ in range(5)
    ]
    return median(runs)


def overhead(device: str) -> list[dict]:
    """Host time of a call on tiny inputs above a torch op without a kernel, and of the import."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q = torch.randn(1, 1, 1, 64, device=device, dtype=dtype)
    lse = torch.zeros(2, 1, 1, 1, device=device)
    outs = torch.randn(2, 1, 1, 1, 64, device=device, dtype=dtype)
    scores = torch.randn(1, 1, 1, 1, device=device)
    empty_us = _call_us(lambda: torch.ops.aten.detach.default(q))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    calls = {
        "attend": lambda: attnsieve.block_sparse_attention(q, q, q),
        "merge_states": lambda: attnsieve.merge_states(outs, lse),
        "select_blocks": lambda: attnsieve.select_from_scores(scores, 1, 1, topk=1),
    }
    rows = []
    with torch.no_grad():
        for op, run in calls.items():
            us = _call_us(run)
            peer = {"sdpa": _call_us(lambda: sdpa(q, q, q)) / 1e3} if op == "attend" else {}
            rows.append(
                row(
                    op,
                    f"call overhead {op}",
                    device,
                    us / 1e3,
                    peer,
                    dtype=dtype,
                    above_empty_op_us=round(us - empty_us, 2),
                )
            )
    seconds = _import_s("import torch; t = time.perf_counter(); import attnsieve")
    rows.append(row("import", "import beyond torch", device, seconds * 1e3, {}, dtype=dtype))
    return rows


def cpu(quick: bool) -> list[dict]:
    """fp32 block-sparse and dense against torch SDPA, interleaved."""
    rows = []
    repeats = 3 if quick else 7
    for h, d, length in ((8, 64, 8192), (8, 128, 4096)):
        q, k, v = (torch.randn(1, h, length, d) for _ in range(3))
        n = length // 64
        for density in (0.1, 1.0):
            kept = int(n * density)
            torch.manual_seed(0)
            lists = torch.rand(1, h, n, n).argsort(-1)[..., :kept].sort(-1).values.int()
            counts = torch.full((1, h, n), kept, dtype=torch.int32)
            index = attnsieve.BlockIndex(counts, lists.contiguous(), 64, 64)
            runs = {
                "ours": lambda index=index: attnsieve.block_sparse_attention(q, k, v, index),
                **peers.dense(q, k, v, False),
            }
            times = time_interleaved(runs, repeats)
            ours = times.pop("ours")
            pairs = h * n * kept * 64 * 64
            all_pairs = h * length * length
            rows.append(
                row(
                    "attend",
                    f"sparse d{d} L{length} h{h} block64 density{density}",
                    "cpu",
                    ours,
                    times,
                    pairs=pairs,
                    head_dim=d,
                    density=density,
                    dtype=torch.float32,
                    shape=q.shape,
                    gflops_ours=round(4 * d * pairs / ours / 1e6, 1),
                    gflops_sdpa=round(4 * d * all_pairs / times["sdpa"] / 1e6, 1),
                    threads=torch.get_num_threads(),
                )
            )
    return rows


SUITES = {
    "dense": ("cuda", dense),
    "sparse": ("cuda", sparse),
    "select": ("cuda", select),
    "overhead": ("cuda", lambda quick: overhead("cuda")),
    "cpu": ("cpu", cpu),
    "cpu-overhead": ("cpu", lambda quick: overhead("cpu")),
}


def main() -> int:
    """Run the suites and write their files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", nargs="+", choices=SUITES)
    parser.add_argument("--out", type=Path, help="folder of the results files")
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    args = parser.parse_args()
    for suite in args.suite:
        device, run = SUITES[suite]
        torch.manual_seed(0)
        folder = args.out or results.RESULTS / device_name(device)
        results.write(folder / f"{suite}.json", run(args.quick))
    return 0


if __name__ == "__main__":
    sys.exit(main())
