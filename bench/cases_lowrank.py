"""The suite of the low-rank family: proxies scored, a step beside dense decoding, the fit."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

import attnsieve
import peers
from cases_decode import BUDGET, DIM, HEADS, KV_HEADS, graphed, random_cache, terabytes
from measure import row, time_gpu, timed_peers

RANK, LENGTH = 32, 131072
# Of a step's query with the last one's.
COSINE = 0.98


def lowrank(choice) -> Iterator[dict]:
    """128k keys, 32 numbers of each per KV head, 2048 kept; and what fitting these costs."""
    for batch in (1, 8):
        name = f"lowrank B{batch} L{LENGTH} r{RANK} k{BUDGET}"
        if choice.takes(name):
            yield from _steps(name, batch)
    name = f"lowrank-offload B4 L{LENGTH} k{BUDGET}"
    if choice.takes(name):
        yield _offload(name, 4)
    name = f"lowrank fit L{LENGTH} r{RANK}"
    if choice.takes(name):
        yield _fit(name)


def _steps(name: str, batch: int) -> Iterator[dict]:
    q, k, v = random_cache(batch, LENGTH)
    rivals = timed_peers(peers.decode(q, k, v))
    to_q, to_k = (
        torch.randn(KV_HEADS, DIM, RANK, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    proxy = k @ to_k
    narrow = q[..., :RANK].contiguous()

    def score():
        return attnsieve.proxy_scores(
            narrow, proxy, row_reduce="max", head_reduce="max", num_out_heads=KV_HEADS
        )

    def step():
        return attnsieve.low_rank_attention(q, k, v, projection=to_q, proxy=proxy, k=BUDGET)

    score_ms = time_gpu(graphed(score))
    yield row(
        "proxy_scores",
        f"{name} score alone",
        "cuda",
        score_ms,
        {},
        shape=proxy.shape,
        tb_per_s=terabytes(proxy.numel(), score_ms),
    )
    yield row(
        "low_rank_attention",
        name,
        "cuda",
        time_gpu(graphed(step)),
        rivals,
        density=BUDGET / LENGTH,
        shape=q.shape,
    )


def _offload(name: str, batch: int, steps: int = 64) -> dict:
    """Keys and values in host memory; beside copying all of them at each step.

    Queries walk at random, so that lists change as they do from token to token. Reported besides:
    the share of a list that was in a slot, bytes copied in a step, GB/s of the host link.
    """
    q, k, v = random_cache(batch, LENGTH)
    to_q, to_k = (
        torch.randn(KV_HEADS, DIM, RANK, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    proxy = k @ to_k
    # A token's key and value side by side, as LowRankCache has them.
    both = attnsieve.host_cache((*k.shape[:3], 2, DIM), dtype=k.dtype)
    hosts = both.unbind(3)
    for host, x in zip(hosts, (k, v), strict=True):
        host.copy_(x)
    pinned = torch.empty(k.shape, dtype=k.dtype, pin_memory=True)
    whole = 2 * time_gpu(lambda: k.copy_(pinned, non_blocking=True))
    dense = peers.decode(q, k, v)["cudnn"]
    held = attnsieve.WorkingSet(batch, KV_HEADS, BUDGET, DIM, dtype=k.dtype, device="cuda")
    options = dict(projection=to_q, proxy=proxy, k=BUDGET, working_set=held)
    step = graphed(lambda: attnsieve.low_rank_attention(q, *hosts, **options))

    def walk(count: int) -> float:
        """Mean milliseconds of a step."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(count):
            q.mul_(COSINE).add_(torch.randn_like(q), alpha=math.sqrt(1 - COSINE**2))
            step()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / count

    walk(8)
    held.moved.zero_()
    ms = walk(steps)
    moved = held.bytes_moved / steps
    link = 2 * k.numel() * k.element_size() / whole / 1e6
    return row(
        "low_rank_attention",
        name,
        "cuda",
        ms,
        {"full-transfer": whole + time_gpu(dense)},
        density=BUDGET / LENGTH,
        shape=q.shape,
        hit_rate=round(held.hit_rate, 4),
        bytes_moved=round(moved),
        link_gb_per_s=round(link, 2),
        link_ms=round(moved / link / 1e6, 5),
    )


def _fit(name: str) -> dict:
    """Beside our dense prefill of as many tokens."""
    q, k, v = (
        torch.randn(1, h, LENGTH, DIM, device="cuda", dtype=torch.bfloat16)
        for h in (HEADS, KV_HEADS, KV_HEADS)
    )
    dense_ms = time_gpu(lambda: attnsieve.block_sparse_attention(q, k, v, causal=True))
    return row(
        "lowrank_fit",
        name,
        "cuda",
        time_gpu(lambda: attnsieve.lowrank_fit(q, k, RANK)),
        {},
        shape=q.shape,
        ours_dense_ms=round(dense_ms, 5),
    )
