"""Attention over a given selection equals dense masked float64 attention within the rule."""

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
    PAIRS,
    Case,
    build,
    pairwise,
    params,
    randn,
    random_index,
)
from numerics import assert_attention_close, check_against_oracle, pytorch_same_dtype

SMALL_PAIRS = [pair for pair in PAIRS if max(pair) <= 1024]
LONG_PAIRS = [pair for pair in PAIRS if max(pair) > 1024]


def dense_cases(device):
    picks = pairwise(
        seqlens=SMALL_PAIRS,
        heads=GQA,
        dtype=DTYPES[device],
        head_dim=HEAD_DIMS[device],
        mask=[(False, None), (True, None), (False, (100, 70)), (False, (-1, 5)), (True, (64, 0))],
        sink=(False, True),
    )
    return [_case(device, i, pick) for i, pick in enumerate(picks)]


def sparse_cases(device):
    picks = pairwise(
        seed=1,
        seqlens=[pair for pair in SMALL_PAIRS if min(pair) > 1],
        heads=[(4, 4), (8, 2), (6, 3), (4, 1)],
        dtype=DTYPES[device],
        head_dim=HEAD_DIMS[device],
        mask=[(False, None), (True, None), (False, (100, 70)), (True, (64, 0))],
        block=BLOCKS,
        density=DENSITIES,
        list_heads=("q", "kv", "one"),
    )
    return [_case(device, 1000 + i, pick) for i, pick in enumerate(picks)]


def edge_cases(device):
    """Every ragged length on either side, block sizes dealt out in turn."""
    cases = []
    for i, length in enumerate(EDGE):
        common = dict(heads=(2, 1), dtype=DTYPES[device][i % len(DTYPES[device])], batch=1, seed=i)
        block = BLOCKS[i % 4]
        cases.append(Case(device, length, 200, block=block, density=0.7, causal=True, **common))
        cases.append(Case(device, 130, length, block=block, density=0.7, **common))
    return cases


def _case(device, seed, pick):
    (seqlen_q, seqlen_k), (causal, window) = pick.pop("seqlens"), pick.pop("mask")
    if device == "cpu" and seqlen_q * seqlen_k > 100_000:  # the oracle's time, not the kernel's
        num_heads, num_kv_heads = pick["heads"]
        pick |= dict(heads=(num_heads // num_kv_heads, 1), batch=1)
    if device == "cpu" and seqlen_q * seqlen_k > 500_000:
        pick |= dict(heads=(1, 1), list_heads="one")
    return Case(device, seqlen_q, seqlen_k, causal=causal, window=window, seed=seed, **pick)


def _both(make):
    return params([*make("cpu"), *make("cuda")])


@pytest.mark.parametrize("case", _both(dense_cases))
def test_dense(case):
    check_against_oracle(attnsieve.block_sparse_attention, build(case), f"{case!r}")


@pytest.mark.parametrize("case", _both(sparse_cases))
def test_block_sparse(case):
    check_against_oracle(attnsieve.block_sparse_attention, build(case), f"{case!r}")


@pytest.mark.parametrize("case", _both(edge_cases))
def test_ragged_lengths(case):
    check_against_oracle(attnsieve.block_sparse_attention, build(case), f"{case!r}")


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
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int().to(device) for x in (lengths_q, lengths_k))
    index = None
    if block is not None:
        batch, longest = len(lengths_q), (max(lengths_q), max(lengths_k))
        index = random_index(batch, 2, *longest, block, 0.6, device)
    sink = randn((4,), device=device, seed=4)
    options = dict(causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, sink=sink)
    out, lse = attnsieve.block_sparse_attention(q, k, v, index, return_lse=True, **options)
    ref = reference.block_sparse_attention(q, k, v, index, return_lse=True, **options)
    pt_out, pt_lse = torch.zeros_like(q), torch.zeros(q.shape[:2], device=device)
    for b in range(len(lengths_q)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        sequence = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
        own = index
        if index is not None:
            own = attnsieve.BlockIndex(index.counts[b : b + 1], index.columns[b : b + 1], *block)
        seqlens = lengths_q[b], lengths_k[b]
        times = reference.index_multiplicity(own, 1, 4, *seqlens).to(device)
        times = times * reference.visible_mask(*seqlens, causal=causal, device=device)
        one_out, one_lse = pytorch_same_dtype(*sequence, times, sink=sink)
        pt_out[rows], pt_lse[rows] = one_out[0].transpose(0, 1), one_lse[0].transpose(0, 1)
    assert_attention_close(out, lse, ref, (pt_out, pt_lse), f"{lengths} {causal} {block}")


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
