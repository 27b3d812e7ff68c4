"""The full numerics matrix: 1,500 random problems per CUDA backend, each against the oracle.

Slow, for nightly runs. Every factor is a deck that is dealt out evenly, shuffled by a fixed seed:
each value appears equally often and together with everything else. The pull-request tier is
``test_numerics_attend.py``.
"""

import functools
import random

import pytest
import torch

import attnsieve
from cases import (
    BACKENDS,
    BLOCKS,
    CUDA_AVAILABLE,
    DENSITIES,
    DTYPES,
    EDGE,
    HEAD_DIMS,
    LAYOUTS,
    PAGE_SIZES,
    PAIRS,
    Case,
    device_of,
    on,
    params,
    refuses_votes,
)
from layouts import build_layout, sequences_of
from numerics import (
    assert_attention_close,
    assert_bitwise,
    check_against_oracle,
    pytorch_same_dtype,
)

pytestmark = pytest.mark.slow

CASES = {"cpu": 300, "sm_80": 1500, "sm_90": 1500}
THRESHOLD_CASES = {"cpu": 60, "sm_80": 300, "sm_90": 300}
THRESHOLDS = (0.0, 1e-3, 0.1, 1.0)
MARGIN = 1e-3  # a decision this close to ln(threshold) may fall either way in float32

MASKS = ((False, None), (True, None), (True, (64, 0)), (False, (100, 70)), (False, (-1, 5)))
HEADS = ((1, 1), (2, 2), (4, 2), (6, 3), (6, 2), (8, 2), (8, 1), (16, 1))
# FlashAttention-3's pairs, every ragged length on either side, and chunks of a prefill.
SEQLENS = (
    *(pair for pair in PAIRS if max(pair) <= 1024),
    *((length, 300) for length in EDGE),
    *((150, length) for length in EDGE),
    *((64, 1000), (128, 2000), (192, 777), (300, 1500)),
)


def deck(values, count, rng):
    """``count`` draws in which each value appears equally often."""
    cards = [value for _ in range(-(-count // len(values))) for value in values][:count]
    rng.shuffle(cards)
    return cards


def matrix(backend, count, seed):
    """Cases of one backend; none where the capability table does not list it."""
    if not HEAD_DIMS[backend]:
        return []
    rng = random.Random(f"{backend} {seed}")
    head_dims = [d for d in HEAD_DIMS[backend] if d >= 64]
    decks = dict(
        seqlens=deck(SEQLENS, count, rng),
        heads=deck(HEADS, count, rng),
        head_dim=deck(head_dims, count, rng),
        dtype=deck(DTYPES[device_of(backend)], count, rng),
        mask=deck(MASKS, count, rng),
        sink=deck((False, True), count, rng),
        layout=deck(LAYOUTS, count, rng),
        page_size=deck(PAGE_SIZES, count, rng),
        block=deck(BLOCKS, count, rng),
        density=deck((None, *DENSITIES), count, rng),
        list_heads=deck(("q", "kv", "one"), count, rng),
        batch=deck((1, 2, 3), count, rng),
    )
    cases = []
    for i in range(count):
        pick = {name: cards[i] for name, cards in decks.items()}
        (seqlen_q, seqlen_k), (causal, window) = pick.pop("seqlens"), pick.pop("mask")
        if backend == "cpu" and seqlen_q * seqlen_k > 100_000:  # the oracle's time
            pick |= dict(batch=1, heads=(2, 1), list_heads="one")
        lengths = dict(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        cases.append(Case(causal=causal, window=window, seed=i, **lengths, **on(backend), **pick))
    return cases


def matrices(counts, seed):
    """Numbered parameters; without a GPU the CPU's cases and one skipped one per GPU backend."""
    cases = []
    for backend in BACKENDS:
        runs = backend == "cpu" or CUDA_AVAILABLE
        cases += matrix(backend, counts[backend] if runs else 1, seed)
    return params(cases, numbered=True)


@pytest.mark.parametrize("case", matrices(CASES, 1))
def test_attend(case):
    check_against_oracle(attnsieve.block_sparse_attention, build_layout(case), f"{case!r}")


@pytest.mark.parametrize("case", matrices(THRESHOLD_CASES, 2))
def test_threshold(case):
    """Decisions of the sequential walk, and attention over the pairs that it keeps."""
    problem = build_layout(case)
    threshold, skip_block = THRESHOLDS[case.seed % 4], (64, 128)[case.seed // 4 % 2]
    attention = functools.partial(
        attnsieve.threshold_attention,
        *problem.args[:3],
        threshold,
        index=problem.index,
        skip_block=skip_block,
        return_lse=True,
        return_counters=True,
        **problem.options,
    )
    if refuses_votes(case.head_dim, skip_block, attention):
        return
    out, lse, counters = attention()
    masks = dict(causal=case.causal, window=case.window)
    walk_options = dict(skip_block=skip_block, **masks)
    sink = problem.options.get("sink")
    for b, (rows_of, one) in enumerate(sequences_of(problem)):
        batch = slice(None) if case.layout == "batched" else slice(b, b + 1)
        walk = attnsieve.reference.threshold_walk(
            one.q, one.k, threshold, index=one.index, **walk_options
        )
        clear = walk.margin > MARGIN
        assert_bitwise(counters[batch][..., 1], walk.counters[..., 1], f"totals {case!r}")
        assert_bitwise(counters[batch][clear], walk.counters[clear], f"skipped {case!r}")
        ref = attnsieve.reference.threshold_attention(
            *one.args[:3],
            threshold,
            index=one.index,
            sink=sink,
            return_lse=True,
            **walk_options,
        )
        pt = pytorch_same_dtype(*one.args[:3], walk.times, sink=sink)
        results = (rows_of(out), rows_of(lse), *ref, *pt)
        here = [torch.as_tensor(x)[clear] for x in results]
        assert_attention_close(*here[:2], here[2:4], here[4:], f"{threshold} {case!r}")
