"""Attention over a given selection equals dense masked float64 attention within the rule."""

import itertools

import pytest
import torch

import attnsieve
from attnsieve import reference
from cases import (
    BLOCKS,
    DENSITIES,
    DTYPES,
    EDGE,
    GQA,
    HEAD_DIMS,
    LAYOUTS,
    PAGE_SIZES,
    PAIRS,
    Case,
    Problem,
    build,
    device_of,
    every_backend,
    on,
    pairwise,
    randn,
    random_index,
)
from layouts import build_layout, offsets
from numerics import assert_attention_close, check_against_oracle

SMALL_PAIRS = [pair for pair in PAIRS if max(pair) <= 1024]
LONG_PAIRS = [pair for pair in PAIRS if max(pair) > 1024]


def dense_cases(backend):
    picks = pairwise(
        seqlens=SMALL_PAIRS,
        heads=GQA,
        dtype=DTYPES[device_of(backend)],
        head_dim=HEAD_DIMS[backend],
        mask=[(False, None), (True, None), (False, (100, 70)), (False, (-1, 5)), (True, (64, 0))],
        sink=(False, True),
    )
    return [_case(backend, i, pick) for i, pick in enumerate(picks)]


def sparse_cases(backend):
    picks = pairwise(
        seed=1,
        seqlens=[pair for pair in SMALL_PAIRS if min(pair) > 1],
        heads=[(4, 4), (8, 2), (6, 3), (4, 1)],
        dtype=DTYPES[device_of(backend)],
        head_dim=HEAD_DIMS[backend],
        mask=[(False, None), (True, None), (False, (100, 70)), (True, (64, 0))],
        block=BLOCKS,
        density=DENSITIES,
        list_heads=("q", "kv", "one"),
    )
    return [_case(backend, 1000 + i, pick) for i, pick in enumerate(picks)]


def edge_cases(backend):
    """Every ragged length on either side, block sizes dealt out in turn."""
    cases, dtypes = [], DTYPES[device_of(backend)]
    for i, length in enumerate(EDGE):
        common = dict(heads=(2, 1), dtype=dtypes[i % len(dtypes)], batch=1, seed=i, **on(backend))
        common |= dict(block=BLOCKS[i % len(BLOCKS)], density=0.7)
        cases.append(Case(seqlen_q=length, seqlen_k=200, causal=True, **common))
        cases.append(Case(seqlen_q=130, seqlen_k=length, **common))
    return cases


def layout_cases(backend):
    """Varlen and pages, with everything that meets a key's position."""
    picks = pairwise(
        seed=2,
        layout=LAYOUTS[1:],
        page_size=PAGE_SIZES,
        seqlens=[(64, 200), (130, 333), (1, 257), (200, 65)],
        heads=[(4, 2), (3, 3)],
        dtype=DTYPES[device_of(backend)],
        head_dim=[d for d in HEAD_DIMS[backend] if d >= 64],
        mask=[(False, None), (True, None), (True, (100, 0)), (False, (70, 30))],
        block=BLOCKS,
        density=(None, 0.4, 1.0),
        list_heads=("q", "kv"),
        sink=(False, True),
    )
    return [_case(backend, 2000 + i, pick | dict(batch=3)) for i, pick in enumerate(picks)]


def long_list_cases(backend):
    """Rows of more pieces than a warp resolves at once, several times over."""
    dtypes, dims = DTYPES[device_of(backend)], HEAD_DIMS[backend]
    cases = []
    for i, (block, layout) in enumerate(itertools.product(BLOCKS, ("batched", "paged"))):
        common = dict(batch=1, heads=(2, 1), density=0.9, block=block, layout=layout, page_size=64)
        common |= dict(dtype=dtypes[i % len(dtypes)], head_dim=dims[i % len(dims)])
        cases.append(Case(seqlen_q=70, seqlen_k=4700, causal=i % 3 == 0, **common, **on(backend)))
    return cases


def _case(backend, seed, pick):
    (seqlen_q, seqlen_k), (causal, window) = pick.pop("seqlens"), pick.pop("mask")
    if backend == "cpu" and seqlen_q * seqlen_k > 100_000:  # the oracle's time, not the kernel's
        num_heads, num_kv_heads = pick["heads"]
        pick |= dict(heads=(num_heads // num_kv_heads, 1), batch=1)
    if backend == "cpu" and seqlen_q * seqlen_k > 500_000:
        pick |= dict(heads=(1, 1), list_heads="one")
    lengths = dict(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    return Case(causal=causal, window=window, seed=seed, **lengths, **on(backend), **pick)


@pytest.mark.parametrize("case", every_backend(dense_cases))
def test_dense(case):
    check_against_oracle(attnsieve.block_sparse_attention, build(case), f"{case!r}")


@pytest.mark.parametrize("case", every_backend(sparse_cases))
def test_block_sparse(case):
    check_against_oracle(attnsieve.block_sparse_attention, build(case), f"{case!r}")


@pytest.mark.parametrize("case", every_backend(edge_cases))
def test_ragged_lengths(case):
    check_against_oracle(attnsieve.block_sparse_attention, build(case), f"{case!r}")


@pytest.mark.parametrize("case", every_backend(layout_cases))
def test_varlen_and_pages(case):
    check_against_oracle(attnsieve.block_sparse_attention, build_layout(case), f"{case!r}")


@pytest.mark.parametrize("case", every_backend(long_list_cases))
def test_long_lists(case):
    check_against_oracle(attnsieve.block_sparse_attention, build_layout(case), f"{case!r}")


@pytest.mark.slow
@pytest.mark.parametrize("density", [None, 0.1, 0.7])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlens", LONG_PAIRS, ids=str)
def test_long(device, seqlens, causal, density):
    case = Case(device, *seqlens, (2, 1), causal=causal, density=density, block=(128, 64), batch=1)
    check_against_oracle(attnsieve.block_sparse_attention, build(case), f"{case!r}")


VARLEN_LENGTHS = {
    "ragged": ([100, 1, 257, 64], [100, 130, 300, 64]),
    "empty_sequences": ([0, 65, 0, 128], [70, 65, 0, 0]),
    "one": ([129], [255]),
}


@pytest.mark.parametrize("block", [None, *BLOCKS], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", VARLEN_LENGTHS)
def test_varlen(device, lengths, causal, block):
    lengths_q, lengths_k = VARLEN_LENGTHS[lengths]
    dtype = DTYPES[device][len(lengths) % len(DTYPES[device])]
    where = dict(dtype=dtype, device=device)
    q = randn((sum(lengths_q), 4, 64), seed=1, **where)
    k, v = (randn((sum(lengths_k), 2, 64), seed=s, **where) for s in (2, 3))
    index = None
    if block is not None:
        batch, longest = len(lengths_q), (max(lengths_q), max(lengths_k))
        index = random_index(batch, 2, *longest, block, 0.6, device)
    options = dict(causal=causal, sink=randn((4,), device=device, seed=4))
    options |= dict(
        cu_seqlens_q=offsets(lengths_q, device), cu_seqlens_k=offsets(lengths_k, device)
    )
    problem = Problem(q, k, v, index, options)
    check_against_oracle(attnsieve.block_sparse_attention, problem, f"{lengths} {causal} {block}")


@pytest.mark.parametrize("skip_block", [64, 128])
@pytest.mark.parametrize("density", [None, 0.4])
@pytest.mark.parametrize("causal", [False, True])
def test_threshold_zero_and_none(device, causal, density, skip_block):
    """The threshold path at thresholds that skip nothing, whatever its visiting order."""
    case = Case(device, 200, 333, causal=causal, density=density, block=(64, 128), seed=5)
    for threshold in (None, 0.0):

        def attention(q, k, v, index, threshold=threshold, **options):
            return attnsieve.threshold_attention(
                q, k, v, threshold, index=index, skip_block=skip_block, **options
            )

        check_against_oracle(attention, build(case), f"{threshold} {skip_block} {case!r}")


@pytest.mark.parametrize("rise", [0.5, 5.0, 12.0])  # of the logits, from a tile to the next
@pytest.mark.parametrize("head_dim", [64, 128])
def test_maxima_that_rise_from_tile_to_tile(device, head_dim, rise):
    """In the visiting order: rows rescale what they have gathered, each by its own factors."""
    case = Case(device, 200, 768, head_dim=head_dim, seed=6)
    problem = build(case)
    tiles = torch.tensor([1.0, 2, 3, 4, 5, 0], device=device)  # the last tile is visited first
    rows = torch.arange(case.seqlen_q, device=device) % 3 / 2  # by half of it, or not at all
    problem.q[..., 0] = rows.to(case.dtype) * head_dim**0.5
    problem.k[..., 0] = (rise * tiles).repeat_interleave(128).to(case.dtype)
    check_against_oracle(attnsieve.block_sparse_attention, problem, f"{rise} {head_dim}")
    q, k, v = problem.q, problem.k, problem.v
    none, zero = (attnsieve.threshold_attention(q, k, v, x, return_lse=True) for x in (None, 0.0))
    for got, want in zip(zero, none, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("num_states", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_states(device, dtype, num_states):
    if dtype not in DTYPES[device]:
        dtype = torch.float32  # partial results may be float32 on any device
    outs = randn((num_states, 2, 3, 50, 64), dtype=dtype, device=device, seed=1)
    lses = 5 * randn((num_states, 2, 3, 50), device=device, seed=2)
    lses[0, :, :, 7] = -torch.inf
    lses[:, :, :, 9] = -torch.inf
    outs[0, :, :, 7] = 0
    outs[:, :, :, 9] = 0
    out, lse = attnsieve.merge_states(outs, lses)
    ref = reference.merge_states(outs, lses)
    weights = torch.softmax(lses, 0).nan_to_num(0).unsqueeze(-1)
    pt = (weights * outs.float()).sum(0).to(dtype), torch.logsumexp(lses, 0)
    assert out.dtype == dtype
    assert_attention_close(out, lse, ref, pt, f"{dtype} {num_states}")
