"""Suites of compare.py for the decode family: attention over a KV cache, top-k, a Quest step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import attnsieve
import peers
from measure import Run, row, time_gpu, time_interleaved, timed_peers

HEADS, KV_HEADS, DIM, PAGE, BUDGET = 32, 8, 128, 16, 2048


def terabytes(elements: float, ms: float, size: int = 2) -> float:
    """TB/s of what had to be read."""
    return round(size * elements / ms / 1e9, 3)


def random_cache(batch: int, length: int) -> tuple[torch.Tensor, ...]:
    """q of one new row, K and V, contiguous."""
    shapes = ((HEADS, 1), (KV_HEADS, length), (KV_HEADS, length))
    return tuple(
        torch.randn(batch, h, n, DIM, device="cuda", dtype=torch.bfloat16) for h, n in shapes
    )


def _pages(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Caches of as many keys in pages of 16 that are dealt at random; their contents differ."""
    batch, length = k.shape[0], k.shape[2]
    shape = (batch * length // PAGE, PAGE, KV_HEADS, DIM)
    table = torch.randperm(shape[0], device="cuda").int().view(batch, -1)
    lens = torch.full((batch,), length, device="cuda", dtype=torch.int32)
    return k.view(shape), v.view(shape), dict(block_table=table, seq_lens=lens)


def random_tokens(batch: int, length: int, unit: int) -> attnsieve.TokenIndex:
    """2048 tokens for each KV head, in pages of `unit`, ascending."""
    draw = torch.rand(batch, KV_HEADS, length // unit, device="cuda")
    indices = draw.topk(BUDGET // unit).indices.sort(-1).values.int()
    return attnsieve.TokenIndex(indices, page_size=unit)


def graphed(run: Run) -> Run:
    """`run` as one CUDA graph, so that launches cost what they cost in a served model."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def decode(choice) -> Iterator[dict]:
    """Everything, contiguous and in pages of 16, beside contiguous peers."""
    for batch, length in ((1, 131072), (8, 32768), (8, 131072), (32, 32768)):
        name = f"decode B{batch} L{length}"
        if not choice.takes(name):
            continue
        q, k, v = random_cache(batch, length)
        rivals = timed_peers(peers.decode(q, k, v))
        k_pages, v_pages, where = _pages(k, v)
        runs = {
            name: graphed(lambda: attnsieve.decode(q, k, v)),
            f"{name} page16": graphed(lambda: attnsieve.decode(q, k_pages, v_pages, **where)),
        }
        for case, run in runs.items():
            ms = time_gpu(run)
            read = terabytes(2 * k.numel(), ms)
            yield row("decode", case, "cuda", ms, rivals, shape=q.shape, tb_per_s=read)


def sparse_decode(choice) -> Iterator[dict]:
    """2048 of 128k keys per KV head, single tokens and pages of 16; our dense time beside it."""
    for batch in (1, 8, 32):
        name = f"decode B{batch} L131072"
        if not choice.takes(name):
            continue
        q, k, v = random_cache(batch, 131072)
        dense_ms = time_gpu(graphed(lambda: attnsieve.decode(q, k, v)))
        k_pages, v_pages, where = _pages(k, v)
        for unit in (1, PAGE):
            index = random_tokens(batch, 131072, unit)
            runs = {
                "": graphed(lambda: attnsieve.decode(q, k, v, index)),
                " page16": graphed(lambda: attnsieve.decode(q, k_pages, v_pages, index, **where)),
            }
            for layout, run in runs.items():
                ms = time_gpu(run)
                read = terabytes(2 * batch * KV_HEADS * BUDGET * DIM, ms)
                kind = "tokens" if unit == 1 else f"pages of {unit}"
                yield row(
                    "decode",
                    f"{name} 2048 {kind}{layout}",
                    "cuda",
                    ms,
                    {},
                    density=BUDGET / 131072,
                    shape=q.shape,
                    tb_per_s=read,
                    ours_dense_ms=round(dense_ms, 5),
                )


def topk(choice) -> Iterator[dict]:
    """Exact selection of 2048 scores a row beside torch.topk; rows of equal values as well."""
    for rows, length in ((1, 32768), (8, 131072), (64, 32768), (64, 131072), (256, 32768)):
        name = f"topk2048 rows{rows} L{length}"
        if not choice.takes(name):
            continue
        scores = torch.randn(rows, 1, length, device="cuda")
        peer = {"torch.topk": time_gpu(graphed(lambda: torch.topk(scores, BUDGET, dim=-1)))}
        normal = None
        for kind in ("", " all equal"):
            if kind:
                scores.fill_(0.5)
            ms = time_gpu(graphed(lambda: attnsieve.select_topk(scores, BUDGET)))
            normal = normal or ms
            yield row(
                "select_topk",
                name + kind,
                "cuda",
                ms,
                peer if not kind else {},
                dtype=torch.float32,
                density=BUDGET / length,
                shape=scores.shape,
                tb_per_s=terabytes(scores.numel(), ms, 4),
                times_random_ms=round(ms / normal, 3),
            )


def quest(choice) -> Iterator[dict]:
    """Score page bounds, select 128 of 8192 pages, attend; one CUDA graph of three launches."""
    for batch in (1, 8):
        name = f"quest B{batch} L131072 page16 k2048"
        if not choice.takes(name):
            continue
        q, k, v = random_cache(batch, 131072)
        rivals = timed_peers(peers.decode(q, k, v))
        k_pages, v_pages, where = _pages(k, v)
        bounds = torch.stack([k_pages.amin(1), k_pages.amax(1)], 2)

        def score(q=q, bounds=bounds, where=where):
            return attnsieve.proxy_scores(
                q,
                bounds,
                element="bounds",
                page_size=PAGE,
                row_reduce="max",
                head_reduce="max",
                num_out_heads=KV_HEADS,
                **where,
            )

        def step(q=q, k=k_pages, v=v_pages, where=where, score=score):
            best = attnsieve.select_topk(
                score(), BUDGET // PAGE, seq_lens=where["seq_lens"], page_size=PAGE, recent=1
            )
            return attnsieve.decode(q, k, v, best, **where)

        score_ms = time_gpu(graphed(score))
        yield row(
            "proxy_scores",
            f"{name} score alone",
            "cuda",
            score_ms,
            {},
            shape=bounds.shape,
            tb_per_s=terabytes(bounds.numel(), score_ms),
        )
        yield row(
            "topk_attention",
            name,
            "cuda",
            time_gpu(graphed(step)),
            rivals,
            density=BUDGET / 131072,
            shape=q.shape,
        )


def cpu_decode(choice) -> Iterator[dict]:
    """fp32, 2048 of 32k tokens per KV head, against torch SDPA over all of them."""
    length = 32768
    q = torch.randn(1, HEADS, 1, DIM)
    k, v = (torch.randn(1, KV_HEADS, length, DIM) for _ in range(2))
    draw = torch.rand(1, KV_HEADS, length).topk(BUDGET).indices.sort(-1).values.int()
    index = attnsieve.TokenIndex(draw)
    for case, chosen in ((f"decode B1 L{length} k2048", index), (f"decode B1 L{length}", None)):
        if not choice.takes(case):
            continue
        sdpa = torch.nn.functional.scaled_dot_product_attention
        runs = {
            "ours": lambda chosen=chosen: attnsieve.decode(q, k, v, chosen),
            "sdpa": lambda: sdpa(q, k, v, enable_gqa=True),
        }
        times = time_interleaved(runs, 5 if choice.quick else 15)
        yield row(
            "decode",
            case,
            "cpu",
            times.pop("ours"),
            times,
            density=BUDGET / length if chosen is not None else 1.0,
            dtype=torch.float32,
            shape=q.shape,
            threads=torch.get_num_threads(),
        )
