"""The suites of the quantised-estimate family: the parts alone, and attention on what they find."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

import attnsieve
import peers
from measure import row, time_gpu, time_interleaved, timed_peers

HEADS, KV_HEADS, DIM = 32, 8, 128
KEPT = 0.1
SAMPLED = {1: "full", 4: "rows4"}


def _tensors(length: int, device: str, dtype: torch.dtype, heads: tuple[int, int]) -> list:
    return [torch.randn(1, h, length, DIM, device=device, dtype=dtype) for h in (*heads, heads[1])]


def _cudnn(q, k, v) -> dict[str, Callable]:
    return {"cudnn": peers.dense(q, k, v, True)["cudnn"]}


def estimate(choice) -> Iterator[dict]:
    """The parts of an estimate at 64k beside the time of cuDNN's dense attention."""
    length = 16384 if choice.quick else 65536
    q, k, v = _tensors(length, "cuda", torch.bfloat16, (HEADS, KV_HEADS))
    dense = timed_peers(_cudnn(q, k, v))
    of_q = attnsieve.quantize_blocks(q, smooth=False)
    of_k = {n: attnsieve.quantize_blocks(k, bits=n, scale_rows="key_quads") for n in (8, 4)}
    limits = torch.full((1, HEADS, length), 4.5, device="cuda")  # a few blocks in a hundred
    runs: dict[str, tuple[str, Callable]] = {
        "quantize q 8bit": ("quantize_blocks", lambda: attnsieve.quantize_blocks(q, smooth=False))
    }
    for bits in (8, 4):
        runs[f"quantize k {bits}bit"] = (
            "quantize_blocks",
            lambda bits=bits: attnsieve.quantize_blocks(k, bits=bits, scale_rows="key_quads"),
        )
    for stride, sampled in {**SAMPLED, 8: "rows8"}.items():
        for block in (64, 16):
            for bits in (8, 4):
                options = dict(block_k=block, row_stride=stride, causal=True, bits=True)
                runs[f"estimate {sampled} block64x{block} {bits}bit"] = (
                    "estimate_block_scores",
                    lambda of=of_k[bits], options=options: attnsieve.estimate_block_scores(
                        of_q, of, threshold=limits, **options
                    ),
                )
    for name, (op, run) in runs.items():
        case = f"{name} L{length} gqa{HEADS}/{KV_HEADS}"
        if choice.takes(case):
            yield row(op, case, "cuda", time_gpu(run), dense, shape=q.shape)


def _kept(index: attnsieve.BlockIndex, length: int) -> float:
    """Share of the causal blocks."""
    rows = torch.arange(index.num_rows, device=index.device)
    last = ((rows + 1) * index.block_q).clamp(max=length) - 1
    visible = (last // index.block_k + 1).sum() * index.counts.shape[1]
    return float(index.counts.sum() / visible)


def _tau(select: Callable[[float], attnsieve.BlockIndex], length: int) -> float:
    """The threshold that keeps KEPT of the causal blocks, within a fiftieth of it."""
    low, high = 1e-4, 1e4
    for _ in range(24):
        tau = math.sqrt(low * high)
        kept = _kept(select(tau), length)
        if abs(kept - KEPT) < KEPT / 50:
            break
        low, high = (tau, high) if kept > KEPT else (low, tau)
    return tau


def sale(choice) -> Iterator[dict]:
    """quantized_estimate_attention at a tenth of the blocks of 64 x 64, everything included."""
    for length in (16384,) if choice.quick else (65536, 131072):
        names = {
            s: f"sale d{DIM} L{length} gqa{HEADS}/{KV_HEADS} density{KEPT} {name}"
            for s, name in SAMPLED.items()
        }
        if not any(choice.takes(name) for name in names.values()):
            continue
        q, k, v = _tensors(length, "cuda", torch.bfloat16, (HEADS, KV_HEADS))
        dense = timed_peers(_cudnn(q, k, v))
        for stride, name in names.items():
            if not choice.takes(name):
                continue
            options = dict(block_k=64, row_stride=stride)
            tau = _tau(
                lambda tau, options=options: attnsieve.select_estimated(
                    q, k, v, tau=tau, **options
                ),
                length,
            )
            whole = time_gpu(
                lambda: attnsieve.quantized_estimate_attention(q, k, v, tau=tau, **options)
            )
            select = time_gpu(lambda: attnsieve.select_estimated(q, k, v, tau=tau, **options))
            index = attnsieve.select_estimated(q, k, v, tau=tau, **options)
            attend = time_gpu(lambda: attnsieve.block_sparse_attention(q, k, v, index, causal=True))
            lists = _list_ms(index, length)
            yield row(
                "quantized_estimate_attention",
                name,
                "cuda",
                whole,
                dense,
                density=round(_kept(index, length), 4),
                shape=q.shape,
                estimate_ms=round(select - lists, 5),
                select_ms=round(lists, 5),
                attend_ms=round(attend, 5),
            )


def _list_ms(index: attnsieve.BlockIndex, length: int) -> float:
    """Making these lists from bits."""
    blocks = -(-length // index.block_k)
    words = index.to_dense(blocks).unflatten(-1, (-1, 32)).int()
    bits = (words << torch.arange(32, device=index.device, dtype=torch.int32)).sum(-1).int()
    options = dict(block_q=index.block_q, block_k=index.block_k, causal=True)
    del words
    return time_gpu(lambda: attnsieve.select_marked(bits.contiguous(), length, length, **options))


def cpu_sale(choice) -> Iterator[dict]:
    """The same on the CPU, float32, 8 query and 2 KV heads, beside torch SDPA."""
    length = 2048 if choice.quick else 8192
    q, k, v = _tensors(length, "cpu", torch.float32, (8, 2))
    for stride, sampled in SAMPLED.items():
        name = f"sale d{DIM} L{length} gqa8/2 density{KEPT} {sampled}"
        if not choice.takes(name):
            continue
        options = dict(block_k=64, row_stride=stride)
        tau = _tau(
            lambda tau, options=options: attnsieve.select_estimated(q, k, v, tau=tau, **options),
            length,
        )
        index = attnsieve.select_estimated(q, k, v, tau=tau, **options)
        runs = {
            "ours": lambda tau=tau, options=options: attnsieve.quantized_estimate_attention(
                q, k, v, tau=tau, **options
            ),
            "attend": lambda index=index: attnsieve.block_sparse_attention(
                q, k, v, index, causal=True
            ),
            "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            ),
        }
        times = time_interleaved(runs, 3 if choice.quick else 5)
        yield row(
            "quantized_estimate_attention",
            name,
            "cpu",
            times["ours"],
            {"sdpa": times["sdpa"]},
            density=round(_kept(index, length), 4),
            dtype=torch.float32,
            shape=q.shape,
            attend_ms=round(times["attend"], 5),
            threads=torch.get_num_threads(),
        )
