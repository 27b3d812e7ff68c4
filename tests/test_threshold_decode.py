"""Threshold skipping in decode decides as the float64 walk does, and attends to what is kept."""

import pytest
import torch

import attnsieve
from attnsieve import reference
from cases import decode_cases, device_of
from numerics import assert_attention_close, assert_bitwise, pytorch_same_dtype
from threshold_cases import decode_case
from token_lists import OnDevice

# A decision this close to ln(threshold) may legitimately fall either way in float32.
MARGIN = 1e-3
LAMBDAS = (1e-3, 0.3, 4.0)

FACTORS = dict(
    heads=((1, 1), (8, 8), (8, 2), (6, 3), (7, 1), (20, 1), (34, 2)),
    rows=(1, 2, 3, 5, 8),
    lengths=((1500, 0), (700, 127), (1, 1100), (128, 905), (1283, 129)),
    cache=(None, 1, 16, 24, 48, 128),
    missing=(False, True),
    float8=(False, True),
    sink=(False, True),
    causal=(True, False),
    skip_block=(64, 128),
    num_splits=(None, 1, 2, 3, 7, 16, 128),
    two_phase=(False, True),
    own=("float", "scalar", "batch", "head", "both"),
)


CASES = decode_cases(FACTORS)


def threshold_of(value, own, batch, heads):
    """The same lambda, or one that differs by sequence or head, in each of the accepted shapes."""
    table = value * torch.logspace(-0.5, 0.5, batch)[:, None].expand(batch, heads)
    table = table * torch.logspace(-0.3, 0.3, heads)
    shapes = dict(scalar=table[0, 0], batch=table[:, :1], head=table[0], both=table)
    if own == "head" and batch == heads:
        own = "both"
    return value if own == "float" else shapes[own]


def of_walk(options):
    names = ("phase", "sink", "v_scale")
    return {name: value for name, value in options.items() if name not in names}


@pytest.mark.parametrize("device, pick", CASES)
def test_decode_follows_the_walk(device, pick):
    arguments, options, (q, k, v) = decode_case(pick)
    splits = {name: pick[name] for name in ("skip_block", "num_splits", "two_phase")}
    run = OnDevice(attnsieve, device_of(device)).threshold_attention
    skipped = total = 0
    for value in LAMBDAS:
        threshold = threshold_of(value, pick["own"], *q.shape[:2])
        walk = reference.threshold_decode_walk(
            *arguments[:2], threshold, **splits, **of_walk(options)
        )
        results = dict(return_lse=True, return_counters=True)
        out, lse, counters = run(*arguments, threshold, **splits, **options, **results)
        clear = walk.margin > MARGIN
        assert clear.float().mean() > 0.5, "the case decides too little away from the threshold"
        assert_bitwise(counters[..., 1], walk.counters[..., 1], f"totals at {value}")
        assert_bitwise(counters[clear], walk.counters[clear], f"counters at {value}")
        ref = reference.threshold_attention(
            *arguments, threshold, **splits, **options, return_lse=True
        )
        times = walk.times[..., : k.shape[2]]
        pt = pytorch_same_dtype(q, k, v, times, sink=options.get("sink"))
        here = [x[clear] for x in (out, lse, *ref, *pt)]
        assert_attention_close(*here[:2], here[2:4], here[4:], f"{value} {pick}")
        skipped += int(counters[..., 0].sum())
        total += int(counters[..., 1].sum())
    tiles = -(-max(pick["lengths"]) // pick["skip_block"])
    num_splits = pick["num_splits"] or 1  # the default of caches this small
    if pick["two_phase"] or 2 * num_splits < tiles:
        assert 0 < skipped < total, f"{skipped} of {total} skipped: the case tests nothing"
    elif num_splits >= tiles:
        assert skipped == 0
