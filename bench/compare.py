"""Times our ops beside the peers: same tensors, same process, interleaved where it matters.

Usage: python bench/compare.py SUITE [SUITE ...] [--out DIR] [--quick] [--only TEXT]
Suites: dense, sparse, sparse-long, gqa, select, overhead, decode, sparse-decode, topk, quest,
threshold, threshold-model (loads the demo's model), threshold-decode, estimate, sale,
lowrank (GPU); cpu, cpu-overhead, cpu-decode, cpu-sale (CPU).

Writes DIR/<suite>.json (default bench/results/<gpu or cpu>) after every case; with --only the other
cases of that file stay as they were. Case names and lists are those of shared/peers.

TF counts kept query-key pairs: 4 * head_dim * pairs / time. GPU times are medians of CUDA events
with a cold L2 (triton do_bench).
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import attnsieve
import cases_decode
import cases_estimate
import cases_lowrank
import cases_threshold
import peers
import results
from measure import call_us, device_name, import_s, row, time_gpu, time_interleaved, timed_peers


@dataclass(frozen=True)
class Choice:
    """Which cases of a suite run."""

    quick: bool
    only: str

    def takes(self, case: str) -> bool:
        """Whether the case's name contains what --only asks for."""
        return self.only in case


def random_tensors(heads: int, kv_heads: int, length: int, d: int, dtype=torch.bfloat16, batch=1):
    """q, k, v [batch, heads, length, d]."""
    return [
        torch.randn(batch, h, length, d, device="cuda", dtype=dtype)
        for h in (heads, kv_heads, kv_heads)
    ]


def random_lists(heads: int, n_q: int, n_k: int, kept: int) -> torch.Tensor:
    """int32 [1, heads, n_q, kept] of sorted unique KV block ids, drawn head by head."""
    torch.manual_seed(0)
    rows = [
        torch.rand(n_q, n_k, device="cuda").argsort(-1)[:, :kept].sort(-1).values.int()
        for _ in range(heads)
    ]
    return torch.stack(rows)[None].contiguous()


def random_causal_lists(heads: int, n: int, density: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [1, heads, n] and columns [1, heads, n, n] of blocks strictly below the diagonal.

    Block 0 is always kept; the diagonal block is left to the caller.
    """
    torch.manual_seed(0)
    columns = torch.zeros(1, heads, n, n, device="cuda", dtype=torch.int32)
    counts = torch.zeros(1, heads, n, device="cuda", dtype=torch.int32)
    below = torch.tril(torch.ones(n, n, device="cuda", dtype=torch.bool), -1)
    ids = torch.arange(n, device="cuda")[None]
    for h in range(heads):
        keep = (torch.rand(n, n, device="cuda") < density) & below
        keep[1:, 0] = True
        counts[0, h] = keep.sum(-1).int()
        columns[0, h] = torch.where(keep, ids, n + 1).sort(-1).values.clamp(max=n - 1).int()
    return counts, columns


def time_lists(q, k, v, lists: torch.Tensor, block_q: int, block_k: int) -> float:
    """Our milliseconds over lists of equal length, non-causal."""
    counts = torch.full(lists.shape[:3], lists.shape[3], device="cuda", dtype=torch.int32)
    index = attnsieve.BlockIndex(counts, lists, block_q, block_k)
    return time_gpu(lambda: attnsieve.block_sparse_attention(q, k, v, index))


def dense(choice: Choice) -> Iterator[dict]:
    """Dense forward at 16k tokens in all; one length in float16 and with other head_dims too."""
    lengths = (4096, 16384) if choice.quick else (4096, 16384, 32768)
    settings = [(d, h, n, torch.bfloat16, "") for d, h in ((128, 16), (64, 32)) for n in lengths]
    settings += [(d, 2048 // d, 16384, torch.bfloat16, "") for d in (96, 256)]
    for d, h, length, dtype, suffix in [*settings, (128, 16, 16384, torch.float16, " fp16")]:
        names = {c: f"dense d{d} L{length} causal{int(c)}{suffix}" for c in (False, True)}
        if not any(choice.takes(name) for name in names.values()):
            continue
        b = max(1, 16384 // length)
        q, k, v = random_tensors(h, h, length, d, dtype, b)
        for causal, name in names.items():
            if not choice.takes(name):
                continue
            ours = time_gpu(lambda: attnsieve.block_sparse_attention(q, k, v, causal=causal))
            yield row(
                "attend",
                name,
                "cuda",
                ours,
                timed_peers(peers.dense(q, k, v, causal)),
                pairs=b * h * length * length * (0.5 if causal else 1),
                head_dim=d,
                dtype=dtype,
                shape=q.shape,
            )


def random_sparse(
    choice: Choice, length: int, h: int, d: int, densities: Iterable[float], fine: Iterable[float]
) -> Iterator[dict]:
    """Random lists per head with our own dense time beside them.

    block_k 32 and 16 run at the densities `fine`: no peer takes them, and their lists keep as many
    pairs as those of block 128, whose time stands beside theirs.
    """
    cases = [
        (block_q, block_k, density)
        for block_q, block_k in ((128, 128), (128, 64), (64, 64), (128, 32), (128, 16))
        for density in (densities if block_k >= 64 else fine)
    ]
    names = {
        case: f"sparse d{d} L{length} h{h} block{case[0]}"
        + (f"x{case[1]}" if case[0] != case[1] else "")
        + f" density{case[2]}"
        for case in cases
    }
    cases = [case for case in cases if choice.takes(names[case])]
    if not cases:
        return
    q, k, v = random_tensors(h, h, length, d)
    dense_ms = time_gpu(lambda: attnsieve.block_sparse_attention(q, k, v))
    block128_ms: dict[float, float] = {}
    for block_q, block_k, density in cases:
        n_q, n_k = length // block_q, length // block_k
        kept = max(2, int(n_k * density))
        extra = {"ours_dense_ms": round(dense_ms, 5)}
        if block_k < 64:
            coarse = max(2, int(length // 128 * density))
            kept = coarse * (128 // block_k)
            if density not in block128_ms:  # its own row was filtered out
                coarse_lists = random_lists(h, n_q, length // 128, coarse)
                block128_ms[density] = time_lists(q, k, v, coarse_lists, 128, 128)
            extra["ours_block128_ms"] = round(block128_ms[density], 5)
        lists = random_lists(h, n_q, n_k, kept)
        ours = time_lists(q, k, v, lists, block_q, block_k)
        if block_q == block_k == 128:
            block128_ms[density] = ours
        rivals = peers.block_sparse(q, k, v, lists, block_q, block_k) if block_k >= 64 else {}
        yield row(
            "attend",
            names[block_q, block_k, density],
            "cuda",
            ours,
            timed_peers(rivals),
            pairs=h * n_q * kept * block_q * block_k,
            head_dim=d,
            density=density,
            shape=q.shape,
            **extra,
        )


def shared_lists(choice: Choice, length: int = 32768, h: int = 16, hk: int = 4) -> Iterator[dict]:
    """Block 64 with one list per KV group, which no peer takes."""
    n, d = length // 64, 128
    for density in (0.25, 0.05):
        name = f"sparse d{d} L{length} h{h}kv{hk} block64 density{density} shared"
        if not choice.takes(name):
            continue
        q, k, v = random_tensors(h, hk, length, d)
        lists = random_lists(hk, n, n, int(n * density))
        yield row(
            "attend",
            name,
            "cuda",
            time_lists(q, k, v, lists, 64, 64),
            {},
            pairs=h * n * lists.shape[3] * 64 * 64,
            head_dim=d,
            density=density,
            shape=q.shape,
        )


def sparse(choice: Choice) -> Iterator[dict]:
    """Random block lists at 32k."""
    densities = (0.25, 0.1) if choice.quick else (1.0, 0.5, 0.25, 0.1, 0.05)
    yield from random_sparse(choice, 32768, 16, 128, densities, (0.25, 0.1))
    yield from random_sparse(choice, 32768, 32, 64, densities, ())
    yield from shared_lists(choice)


def sparse_long(choice: Choice) -> Iterator[dict]:
    """Random block lists at 128k."""
    densities = (0.1,) if choice.quick else (0.1, 0.05, 0.0125)
    yield from random_sparse(choice, 131072, 8, 128, densities, ())


def gqa(choice: Choice) -> Iterator[dict]:
    """Causal, 32 query heads on 8 KV heads, a list per query head."""
    h, hk, d, block = 32, 8, 128, 128
    for length in (32768,) if choice.quick else (32768, 131072):
        n = length // block
        for density in (0.25, 0.1, 0.05):
            name = f"gqa-causal L{length} density{density}"
            if not choice.takes(name):
                continue
            q, k, v = random_tensors(h, hk, length, d)
            counts, below = random_causal_lists(h, n, density)
            diagonal = torch.arange(n, device="cuda", dtype=torch.int32).expand_as(counts)
            columns = below.scatter(3, counts[..., None].long(), diagonal[..., None])
            index = attnsieve.BlockIndex(counts + 1, columns, block, block)
            yield row(
                "attend",
                name,
                "cuda",
                time_gpu(lambda: attnsieve.block_sparse_attention(q, k, v, index, causal=True)),
                timed_peers(peers.causal_gqa(q, k, v, counts, below, block)),
                pairs=(int(counts.sum()) + 0.5 * h * n) * block * block,
                head_dim=d,
                density=density,
                shape=q.shape,
            )


def select(choice: Choice) -> Iterator[dict]:
    """Pooling and selection at 32k and 128k; torch.topk over the same scores beside it."""
    for length, h in ((32768, 32),) if choice.quick else ((32768, 32), (131072, 32)):
        names = {rule: f"select {rule} L{length} h{h} block64" for rule in ("topk", "topp")}
        if not any(choice.takes(name) for name in names.values()):
            continue
        q = torch.randn(1, h, length, 128, device="cuda", dtype=torch.bfloat16)
        k = torch.randn(1, 8, length, 128, device="cuda", dtype=torch.bfloat16)
        scores = attnsieve.pooled_block_scores(q, k)
        budget = scores.shape[-1] // 10
        pool_ms = time_gpu(lambda: attnsieve.pooled_block_scores(q, k))
        for name, rule in (("topk", {"topk": budget}), ("topp", {"top_p": 0.5})):
            if not choice.takes(names[name]):
                continue
            ours = time_gpu(
                lambda: attnsieve.select_from_scores(scores, length, length, causal=True, **rule)
            )
            peer = {"torch.topk": time_gpu(lambda: torch.topk(scores, budget))}
            yield row(
                "select_blocks",
                names[name],
                "cuda",
                ours,
                peer,
                density=0.1,
                dtype=torch.float32,
                shape=scores.shape,
                pool_ms=round(pool_ms, 5),
            )


def overhead(choice: Choice, device: str) -> Iterator[dict]:
    """Host time of a call on tiny inputs above a torch op without a kernel, and of the import."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q = torch.randn(1, 1, 1, 64, device=device, dtype=dtype)
    lse = torch.zeros(2, 1, 1, 1, device=device)
    outs = torch.randn(2, 1, 1, 1, 64, device=device, dtype=dtype)
    scores = torch.randn(1, 1, 1, 1, device=device)
    empty_us = call_us(lambda: torch.ops.aten.detach.default(q))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    calls = {
        "attend": lambda: attnsieve.block_sparse_attention(q, q, q),
        "merge_states": lambda: attnsieve.merge_states(outs, lse),
        "select_blocks": lambda: attnsieve.select_from_scores(scores, 1, 1, topk=1),
    }
    with torch.no_grad():
        for op, run in calls.items():
            if not choice.takes(f"call overhead {op}"):
                continue
            us = call_us(run)
            peer = {"sdpa": call_us(lambda: sdpa(q, q, q)) / 1e3} if op == "attend" else {}
            yield row(
                op,
                f"call overhead {op}",
                device,
                us / 1e3,
                peer,
                dtype=dtype,
                above_empty_op_us=round(us - empty_us, 2),
            )
    if choice.takes("import beyond torch"):
        seconds = import_s("import torch; t = time.perf_counter(); import attnsieve")
        yield row("import", "import beyond torch", device, seconds * 1e3, {}, dtype=dtype)


def cpu(choice: Choice) -> Iterator[dict]:
    """fp32 block-sparse and dense against torch SDPA, interleaved."""
    repeats = 3 if choice.quick else 7
    for h, d, length in ((8, 64, 8192), (8, 128, 4096)):
        q, k, v = (torch.randn(1, h, length, d) for _ in range(3))
        n = length // 64
        for density in (0.1, 1.0):
            name = f"sparse d{d} L{length} h{h} block64 density{density}"
            if not choice.takes(name):
                continue
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
            yield row(
                "attend",
                name,
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


def threshold_model(choice: Choice) -> Iterator[dict]:
    """Threshold prefill on the tensors of the demo's model."""
    import cases_model  # other suites do without what this one loads

    return cases_model.threshold_model(choice)


SUITES = {
    "dense": ("cuda", dense),
    "sparse": ("cuda", sparse),
    "sparse-long": ("cuda", sparse_long),
    "gqa": ("cuda", gqa),
    "select": ("cuda", select),
    "overhead": ("cuda", lambda choice: overhead(choice, "cuda")),
    "decode": ("cuda", cases_decode.decode),
    "sparse-decode": ("cuda", cases_decode.sparse_decode),
    "topk": ("cuda", cases_decode.topk),
    "quest": ("cuda", cases_decode.quest),
    "threshold": ("cuda", cases_threshold.threshold),
    "threshold-model": ("cuda", threshold_model),
    "threshold-decode": ("cuda", cases_threshold.threshold_decode),
    "estimate": ("cuda", cases_estimate.estimate),
    "sale": ("cuda", cases_estimate.sale),
    "lowrank": ("cuda", cases_lowrank.lowrank),
    "cpu": ("cpu", cpu),
    "cpu-decode": ("cpu", cases_decode.cpu_decode),
    "cpu-sale": ("cpu", cases_estimate.cpu_sale),
    "cpu-overhead": ("cpu", lambda choice: overhead(choice, "cpu")),
}


def main() -> int:
    """Run the suites and write their files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", nargs="+", choices=SUITES)
    parser.add_argument("--out", type=Path, help="folder of the results files")
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    args = parser.parse_args()
    for suite in args.suite:
        device, run = SUITES[suite]
        torch.manual_seed(0)
        path = (args.out or results.RESULTS / device_name(device)) / f"{suite}.json"
        old = results.read(path) if args.only and path.exists() else []
        rows = {found["case"]: found for found in old}
        for found in run(Choice(args.quick, args.only)):
            rows[found["case"]] = found
            results.write(path, list(rows.values()))  # at once: a run cut short keeps its rows
            if device == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
