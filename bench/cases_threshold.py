"""Suites of compare.py for the threshold family, on data whose skip share is controlled.

Keys carry a small code in their last dimensions, queries one of it each: a tile of keys then lies
far below or within the reach of a group of rows, at random, and the groups of a CTA differ.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import attnsieve
import peers
from cases_decode import DIM, HEADS, KV_HEADS, graphed
from measure import row, time_gpu, timed_peers

GROUP, TILE = 64, 128  # query rows that decide together, keys that they decide about
LAMBDA = 1e-3
CODES = 8  # neighbouring groups read different ones
DROP = 16.0  # squared: how far a cold tile's logits lie below the others, in units of 1 / scale


def coded_queries(q: torch.Tensor, group: int) -> torch.Tensor:
    """``q [B, H, S, D]`` whose rows read code ``(row // group) % CODES``."""
    q[..., -CODES:] = 0
    codes = torch.arange(q.shape[2], device=q.device) // group % CODES
    q[..., -CODES:].scatter_(-1, codes[None, None, :, None].expand(*q.shape[:3], 1), DROP)
    return q


def coded_keys(k: torch.Tensor, cold: float, hot: int = 1) -> torch.Tensor:
    """``k [B, H, S, D]`` of whose tiles, but the first `hot`, a share is out of a code's reach."""
    batch, heads, length, _ = k.shape
    tiles = torch.rand(batch, heads, length // TILE, 1, CODES, device=k.device) < cold
    tiles[:, :, :hot] = False  # as the first keys of a text
    k[..., -CODES:] = (tiles * -DROP).expand(-1, -1, -1, TILE, -1).reshape(batch, heads, length, -1)
    return k


def skipped_share(counters: torch.Tensor) -> float:
    """Skipped tiles over all, of ``[B, H, 2]``."""
    skipped, total = counters.sum((0, 1)).tolist()
    return skipped / total


def threshold(choice) -> Iterator[dict]:
    """Prefill. Our own dense kernel on the same data is the peer; cuDNN stands beside it."""
    for length, heads in ((32768, 16), (131072, 4)):
        for causal in (True, False):
            for share in (0.0, 0.5, 0.75, 0.9):
                case = f"threshold d{DIM} L{length} causal{int(causal)} skip{share:g}"
                if not choice.takes(case):
                    continue
                shape = (1, heads, length, DIM)
                q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
                q, k = coded_queries(q, GROUP), coded_keys(k, share)
                kwargs = dict(causal=causal)
                _, counters = attnsieve.threshold_attention(
                    q, k, v, LAMBDA, return_counters=True, **kwargs
                )
                cudnn = {"cudnn": peers.dense(q, k, v, causal)["cudnn"]}
                dense = time_gpu(lambda: attnsieve.threshold_attention(q, k, v, None, **kwargs))
                ours = time_gpu(lambda: attnsieve.threshold_attention(q, k, v, LAMBDA, **kwargs))
                skipped = skipped_share(counters)
                found = row(
                    "attend",
                    case,
                    "cuda",
                    ours,
                    {"attnsieve-dense": dense},
                    pairs=heads * length * length * (0.5 if causal else 1) * (1 - skipped),
                    head_dim=DIM,
                    density=round(1 - skipped, 4),
                    shape=q.shape,
                    skipped=round(skipped, 4),
                )
                found["peers"].update(timed_peers(cudnn))  # does not enter the ratio
                yield found


def threshold_decode(choice) -> Iterator[dict]:
    """Decode: our own dense decode on the same data is the peer; the two-phase mode beside it."""
    for batch in (1, 8):
        splits = attnsieve.threshold_splits(batch * KV_HEADS, 131072, TILE)
        for share in (0.0, 0.5, 0.73, 0.9):
            case = f"threshold-decode B{batch} L131072 skip{share:g}"
            if not choice.takes(case):
                continue
            length = 131072
            q = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
            shape = (batch, KV_HEADS, length, DIM)
            k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv")
            own = length // TILE // splits  # tiles of a split, of which it keeps the first
            q, k = coded_queries(q, GROUP), coded_keys(k, share * own / (own - 1), splits)
            kwargs = dict(phase="decode")
            runs = {
                mode: (
                    lambda mode=mode: attnsieve.threshold_attention(
                        q, k, v, LAMBDA, two_phase=mode, return_counters=True, **kwargs
                    )
                )
                for mode in (False, True)
            }
            skipped = {mode: skipped_share(run()[-1]) for mode, run in runs.items()}
            dense = time_gpu(graphed(lambda: attnsieve.decode(q, k, v)))
            times = {mode: time_gpu(graphed(run)) for mode, run in runs.items()}
            found = row(
                "threshold_decode",
                case,
                "cuda",
                times[False],
                {"attnsieve-dense": dense},
                density=round(1 - skipped[False], 4),
                shape=q.shape,
                skipped=round(skipped[False], 4),
                two_phase_ms=round(times[True], 5),
                two_phase_skipped=round(skipped[True], 4),
            )
            found["peers"].update(timed_peers({"cudnn": peers.decode(q, k, v)["cudnn"]}))
            yield found
