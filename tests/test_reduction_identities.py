"""Identities that need no oracle: what must not change, must not change."""

import dataclasses

import pytest
import torch

import attnsieve
from attnsieve import BlockIndex
from cases import BLOCKS, DTYPES, Case, build, forced_backend, randn, random_index
from layouts import to_pages
from numerics import assert_bitwise, check_against_oracle

attend = attnsieve.block_sparse_attention


def dtype_of(device):
    return DTYPES[device][0]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_full_index_is_dense(device, block, causal):
    """Same keys in the same order: equal up to the order of tiles, here within one rounding."""
    problem = build(Case(device, 300, 450, dtype=dtype_of(device), block=block, density=1.0))
    full = attend(*problem.args, causal=causal, return_lse=True)
    dense = attend(*problem.args[:3], causal=causal, return_lse=True)
    tolerance = dict(rtol=2**-7, atol=2**-9) if full[0].dtype != torch.float32 else {}
    torch.testing.assert_close(full[0], dense[0], **tolerance)
    torch.testing.assert_close(full[1], dense[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("density", [None, 0.4])
def test_permuting_batch_permutes_the_result(device, density):
    problem = build(Case(device, 200, 300, dtype=dtype_of(device), batch=4, density=density))
    order = torch.tensor([2, 0, 3, 1], device=device)
    out, lse = attend(*problem.args, return_lse=True)
    index = problem.index
    if index is not None:
        index = BlockIndex(index.counts[order], index.columns[order], 64, 64)
    shuffled = [x[order] for x in (problem.q, problem.k, problem.v)]
    assert_bitwise(attend(*shuffled, index, return_lse=True), (out[order], lse[order]), "batch")


@pytest.mark.parametrize("density", [None, 0.4])
def test_permuting_heads_permutes_the_result(device, density):
    case = Case(device, 200, 300, (4, 4), dtype=dtype_of(device), density=density)
    problem = build(case)
    order = torch.tensor([2, 0, 3, 1], device=device)
    out, lse = attend(*problem.args, return_lse=True)
    index = problem.index
    if index is not None:
        index = BlockIndex(index.counts[:, order], index.columns[:, order], 64, 64)
    shuffled = [x[:, order] for x in (problem.q, problem.k, problem.v)]
    permuted = attend(*shuffled, index, return_lse=True)
    assert_bitwise(permuted, (out[:, order], lse[:, order]), "heads")


def test_splitting_the_index_and_merging_is_the_whole(device):
    problem = build(Case(device, 256, 512, dtype=dtype_of(device), density=0.8))
    mask = problem.index.to_dense(8)
    first = torch.arange(8, device=device) < 3
    parts = [BlockIndex.from_dense(mask & side, 64, 64) for side in (first, ~first)]
    results = [attend(*problem.args[:3], part, return_lse=True) for part in parts]
    outs, lses = (torch.stack(x) for x in zip(*results, strict=True))
    out, lse = attnsieve.merge_states(outs, lses)
    whole_out, whole_lse = attend(*problem.args, return_lse=True)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-5)
    tolerance = dict(rtol=2**-7, atol=2**-8) if out.dtype != torch.float32 else {}
    torch.testing.assert_close(out, whole_out, **tolerance)


def test_splitting_keys_and_merging_is_the_whole(device):
    problem = build(Case(device, 100, 512, dtype=dtype_of(device)))
    q, k, v = problem.args[:3]
    halves = [
        attend(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(200), slice(200, 512))
    ]
    outs, lses = (torch.stack(x) for x in zip(*halves, strict=True))
    out, lse = attnsieve.merge_states(outs, lses)
    whole_out, whole_lse = attend(q, k, v, return_lse=True)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-5)
    tolerance = dict(rtol=2**-7, atol=2**-8) if out.dtype != torch.float32 else {}
    torch.testing.assert_close(out, whole_out, **tolerance)


@pytest.mark.parametrize("density", [None, 0.4])
def test_scaling_q_up_and_the_scale_down_is_nothing(device, density):
    """Powers of two are exact, so this is bitwise."""
    problem = build(Case(device, 130, 200, dtype=dtype_of(device), density=density, causal=True))
    q, k, v, index = problem.args
    plain = attend(q, k, v, index, causal=True, softmax_scale=0.125, return_lse=True)
    scaled = attend(2 * q, k, v, index, causal=True, softmax_scale=0.0625, return_lse=True)
    assert_bitwise(scaled, plain, "q * 2, scale / 2")


def test_scaling_v_scales_out(device):
    problem = build(Case(device, 130, 200, dtype=dtype_of(device)))
    q, k, v = problem.args[:3]
    assert_bitwise(attend(q, k, 4 * v), 4 * attend(q, k, v), "v * 4")


def test_varlen_of_equal_lengths_is_batched(device):
    problem = build(Case(device, 128, 320, dtype=dtype_of(device), density=0.5, causal=True))
    out, lse = attend(*problem.args, causal=True, return_lse=True)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in problem.args[:3])
    cu_q, cu_k = (torch.tensor([0, n, 2 * n], device=device).int() for n in (128, 320))
    options = dict(causal=True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True)
    flat_out, flat_lse = attend(q, k, v, problem.index, **options)
    assert_bitwise(flat_out, out.transpose(1, 2).flatten(0, 1), "out")
    assert_bitwise(flat_lse, lse.transpose(1, 2).flatten(0, 1), "lse")


@pytest.mark.parametrize("block", [None, (64, 64), (128, 32)], ids=str)
@pytest.mark.parametrize("page_size", [16, 64, 160])
def test_the_order_of_pages_is_nothing(device, page_size, block):
    case = Case(device, 130, 320, dtype=dtype_of(device), causal=True)
    if block is not None:
        case = dataclasses.replace(case, density=0.6, block=block)
    problem = build(case)
    first, second = (
        attend(*paged.args, **paged.options, return_lse=True)
        for paged in (to_pages(problem, [320, 201], page_size, seed) for seed in (1, 2))
    )
    assert_bitwise(first, second, "shuffled pages")
    one = [x[:1] for x in problem.args[:3]]
    index = problem.index
    if index is not None:
        index = BlockIndex(index.counts[:1], index.columns[:1], *block)
    expected = attend(*one, index, causal=True, return_lse=True)
    tolerance = dict(rtol=2**-7, atol=2**-9) if first[0].dtype != torch.float32 else {}
    torch.testing.assert_close(first[0][:1], expected[0], **tolerance)
    torch.testing.assert_close(first[1][:1], expected[1], rtol=1e-5, atol=1e-5)


def test_pages_with_packed_queries_are_pages(device):
    problem = to_pages(
        build(Case(device, 128, 320, dtype=dtype_of(device), density=0.5, causal=True)),
        [320, 111],
        64,
    )
    out, lse = attend(*problem.args, **problem.options, return_lse=True)
    q = problem.q.transpose(1, 2).flatten(0, 1).contiguous()
    cu = torch.tensor([0, 128, 256], device=device).int()
    options = problem.options | dict(cu_seqlens_q=cu, return_lse=True)
    flat_out, flat_lse = attend(q, problem.k, problem.v, problem.index, **options)
    assert_bitwise(flat_out, out.transpose(1, 2).flatten(0, 1), "out")
    assert_bitwise(flat_lse, lse.transpose(1, 2).flatten(0, 1), "lse")


def test_blocks_split_into_smaller_ones_are_the_same_keys(device):
    """Lists of 128-key blocks, written in blocks of 64, 32 and 16."""
    problem = build(Case(device, 200, 512, dtype=dtype_of(device), density=0.5, block=(64, 128)))
    mask = problem.index.to_dense(4)
    expected = attend(*problem.args, return_lse=True)
    for block_k in (64, 32, 16):
        split = BlockIndex.from_dense(mask.repeat_interleave(128 // block_k, -1), 64, block_k)
        actual = attend(*problem.args[:3], split, return_lse=True)
        tolerance = dict(rtol=2**-7, atol=2**-9) if actual[0].dtype != torch.float32 else {}
        torch.testing.assert_close(actual[0], expected[0], **tolerance)
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-5)


def test_gqa_is_repeated_kv(device):
    problem = build(Case(device, 100, 200, (6, 2), dtype=dtype_of(device), density=0.5))
    q, k, v, index = problem.args
    expanded = [x.repeat_interleave(3, dim=1) for x in (k, v)]
    grouped = attend(q, k, v, index, return_lse=True)
    assert_bitwise(grouped, attend(q, *expanded, index, return_lse=True), "GQA")


@pytest.mark.parametrize("list_heads", [1, 2])
def test_shared_lists_are_repeated_lists(device, list_heads):
    problem = build(Case(device, 150, 400, (4, 2), dtype=dtype_of(device)))
    shared = random_index(2, list_heads, 150, 400, device=device)
    repeated = BlockIndex(
        shared.counts.repeat_interleave(4 // list_heads, dim=1),
        shared.columns.repeat_interleave(4 // list_heads, dim=1),
        64,
        64,
    )
    args = problem.args[:3]
    for index in (shared, repeated):
        check_against_oracle(attend, dataclasses.replace(problem, index=index), "Hidx")
    if forced_backend() != "sm_90":  # there heads that share a list take wider softmax steps
        actual = attend(*args, shared, return_lse=True)
        assert_bitwise(actual, attend(*args, repeated, return_lse=True), "Hidx")


def test_window_as_wide_as_the_keys_is_no_window(device):
    problem = build(Case(device, 100, 150, dtype=dtype_of(device)))
    args = problem.args[:3]
    assert_bitwise(attend(*args, window=(150, 150)), attend(*args), "both sides")
    assert_bitwise(attend(*args, window=(-1, 0)), attend(*args, causal=True), "causal")


def test_merge_of_one_state_is_that_state(device):
    outs = randn((1, 2, 3, 70, 64), dtype_of(device), device)
    lses = randn((1, 2, 3, 70), device=device, seed=1)
    assert_bitwise(attnsieve.merge_states(outs, lses), (outs[0], lses[0]), "one state")


def test_merge_with_empty_states_changes_nothing(device):
    outs = randn((3, 2, 70, 64), dtype_of(device), device)
    lses = randn((3, 2, 70), device=device, seed=1)
    outs[1:], lses[1:] = 0, -torch.inf
    assert_bitwise(attnsieve.merge_states(outs, lses), (outs[0], lses[0]), "empty states")
