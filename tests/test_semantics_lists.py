"""Promises of the semantics about lists of blocks and pages of K and V, one test each."""

import math

import pytest
import torch

import attnsieve
from attnsieve import BlockIndex, reference
from cases import (
    BAD_IDS,
    BLOCKS,
    LAYOUTS,
    Case,
    build,
    forced_backend,
    qkv,
    random_index,
)
from layouts import build_layout, to_pages
from numerics import assert_bitwise, check_against_oracle, oracle_and_eager

attend = attnsieve.block_sparse_attention


@pytest.mark.parametrize("list_heads", [1, 2, 6])
def test_list_heads_broadcast(device, list_heads):
    case = Case(device, 150, 300, (6, 2), seed=list_heads)
    problem = build(case)
    problem.index = random_index(2, list_heads, 150, 300, density=0.5, device=device)
    check_against_oracle(attend, problem, f"Hidx = {list_heads}")


def test_index_is_intersected_with_the_mask(device):
    q, k, v = qkv(device, (1, 1, 200, 64), (1, 1, 200, 64))
    full = random_index(1, 1, 200, 200, density=1.0, device=device)
    actual = attend(q, k, v, full, causal=True, window=(50, 0), return_lse=True)
    expected = attend(q, k, v, causal=True, window=(50, 0), return_lse=True)
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_bad_entries_are_skipped(device, block):
    problem = build(Case(device, 200, 300, density=0.6, block=block))
    index, num_k_blocks = problem.index, -(-300 // block[1])
    bad = torch.tensor([*BAD_IDS, num_k_blocks], device=device).int()
    # Every list gets one bad id before each of its entries, and more of them behind the last one.
    width = index.capacity
    mixed = torch.empty((*index.columns.shape[:3], 2 * width), dtype=torch.int32, device=device)
    mixed[..., 0::2] = bad[torch.arange(width, device=device) % len(bad)]
    mixed[..., 1::2] = index.columns
    listed = BlockIndex(2 * index.counts, mixed, *block)

    def attend_listed(q, k, v, _clean_index, **options):
        return attend(q, k, v, listed, **options)

    check_against_oracle(attend_listed, problem, "list with bad ids")
    if forced_backend() != "sm_90":  # there a bad id leaves a gap, and softmax steps differ
        actual = attend(*problem.args[:3], listed, return_lse=True)
        assert_bitwise(actual, attend(*problem.args, return_lse=True), "list with bad ids")


@pytest.mark.parametrize("count", [-1, -(2**31), 2**31 - 1, 1000])
def test_counts_are_clamped(device, count):
    problem = build(Case(device, 128, 300, density=0.6))
    index = problem.index
    index.counts[0, 0, 0] = count
    fixed = index.counts.clamp(0, index.capacity)
    clamped = BlockIndex(fixed, index.columns, 64, 64)
    actual = attend(*problem.args, return_lse=True)
    expected = attend(*problem.args[:3], clamped, return_lse=True)
    assert_bitwise(actual, expected, f"counts = {count}")


def test_a_block_listed_twice_is_attended_twice(device):
    q, k, v = qkv(device, (1, 2, 64, 64), (1, 2, 256, 64))
    ids = torch.tensor([2, 0, 2], device=device).int().expand(1, 1, 1, 3)
    index = BlockIndex(torch.full((1, 1, 1), 3, device=device).int(), ids, 64, 64)
    out, lse = attend(q, k, v, index, return_lse=True)
    ref_out, ref_lse = reference.block_sparse_attention(q, k, v, index, return_lse=True)
    torch.testing.assert_close(lse.double(), ref_lse, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.double(), ref_out, rtol=2**-7, atol=2**-8)


def test_unordered_lists_attend_the_same_keys(device):
    problem = build(Case(device, 128, 640, density=1.0))
    flipped = problem.index.columns.flip(-1).contiguous()
    index = BlockIndex(problem.index.counts, flipped, 64, 64)
    out, lse = attend(*problem.args[:3], index, return_lse=True)
    ref_out, ref_lse = reference.block_sparse_attention(*problem.args[:3], return_lse=True)
    torch.testing.assert_close(lse.double(), ref_lse, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.double(), ref_out, rtol=2**-7, atol=2**-8)


def test_validate_argument_checks_the_index(device):
    problem = build(Case(device, 128, 300, density=1.0))
    attend(*problem.args, validate=True)
    problem.index.columns[1, 2, 1, 3] = 77
    with pytest.raises(ValueError, match=r"columns\[1, 2, 1, 3\] = 77"):
        attend(*problem.args, validate=True)


def test_varlen_rows_beyond_the_index_attend_to_nothing(device):
    q, k, v = qkv(device, (200, 2, 64), (200, 2, 64))
    cu = torch.tensor([0, 200], device=device).int()
    index = random_index(1, 2, 128, 200, density=1.0, device=device)  # 2 rows of 64, 4 needed
    options = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True)
    out, lse = attend(q, k, v, index, **options)
    assert (out[128:] == 0).all() and (lse[128:] == -math.inf).all()
    assert lse[:128].isfinite().all()


@pytest.mark.parametrize("page_size", [16, 64, 96])
def test_pages_are_the_sequence_in_table_order(device, page_size):
    """v counts keys, so out shows which rows of which pages a sequence was read from."""
    lengths = [200, 57]
    problem = build(Case(device, 3, 200, (1, 1), dtype=torch.float16))
    problem.k.zero_()
    problem.v[..., 0] = torch.arange(200, device=device)
    paged = to_pages(problem, lengths, page_size)
    options = paged.options | dict(causal=True, return_lse=True)
    out, lse = attend(*paged.args, **options)
    for b, length in enumerate(lengths):
        for row in range(3):
            seen = length - 2 + row
            assert float(lse[b, 0, row]) == pytest.approx(math.log(seen), abs=1e-5)
            assert float(out[b, 0, row, 0]) == pytest.approx((seen - 1) / 2, rel=1e-3)


@pytest.mark.parametrize("window", [(40, 0), (10, 5)], ids=str)
def test_masks_of_pages_are_relative_to_seq_lens(device, window):
    problem = build(Case(device, 70, 300))
    paged = to_pages(problem, [300, 90], 64)
    options = paged.options | dict(window=window, return_lse=True)
    out, lse = attend(*paged.args, **options)
    for b, length in enumerate((300, 90)):
        one = [x[b : b + 1, :, :length] for x in (problem.k, problem.v)]
        expected = attend(problem.q[b : b + 1], *one, window=window, return_lse=True)
        torch.testing.assert_close(lse[b : b + 1], expected[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out[b : b + 1], expected[0], rtol=2**-7, atol=2**-8)


def test_seq_lens_are_clamped(device):
    problem = build(Case(device, 100, 192, batch=4))
    paged = to_pages(problem, [192, 192, 0, 0], 64)
    expected = attend(*paged.args, **paged.options, return_lse=True)
    clamped = torch.tensor([193, 2**31 - 1, -1, -(2**31)], device=device).int()
    options = paged.options | dict(seq_lens=clamped)
    assert_bitwise(attend(*paged.args, **options, return_lse=True), expected, "lengths")


@pytest.mark.parametrize("block", [None, (64, 64), (128, 16)], ids=str)
@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_keys_behind_a_bad_table_entry_are_masked(device, page_size, block):
    """The entry is never followed; the result is attention over the other keys."""
    case = Case(device, 130, 512, causal=True)
    if block is not None:
        case = Case(device, 130, 512, causal=True, density=0.8, block=block)
    paged = to_pages(build(case), [512, 300], page_size)
    table = paged.options["block_table"]
    bad = torch.tensor([*BAD_IDS, paged.k.shape[0]], device=device).int()
    holes = torch.arange(0, 300 // page_size, 2, device=device)
    table[0, holes] = bad[holes % len(bad)]
    table[1, holes[:1]] = bad[0]
    out, lse = attend(*paged.args, **paged.options, return_lse=True)
    ref = reference.block_sparse_attention(*paged.args, **paged.options, return_lse=True)
    torch.testing.assert_close(lse.double(), ref[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), ref[0], rtol=2**-7, atol=2**-8)
    table[:] = -1
    out, lse = attend(*paged.args, **paged.options, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_takes_every_layout(layout):
    """The public oracle against itself on the sequences taken apart by the tests' own code."""
    for density in (None, 0.5):
        case = Case("cpu", 70, 200, batch=3, causal=True, density=density, layout=layout)
        problem = build_layout(case)
        whole = reference.block_sparse_attention(*problem.args, **problem.options, return_lse=True)
        torch.testing.assert_close(whole, oracle_and_eager(problem)[0], rtol=1e-12, atol=1e-12)


def test_validate_argument_checks_the_pages(device):
    problem = build_layout(Case(device, 70, 200, layout="paged", density=0.5))
    attend(*problem.args, **problem.options, validate=True)
    table, seq_lens = problem.options["block_table"], problem.options["seq_lens"]
    table[0, 1] = problem.k.shape[0]
    with pytest.raises(ValueError, match=r"block_table\[0, 1\]"):
        attend(*problem.args, **problem.options, validate=True)
    seq_lens[0] = -1
    with pytest.raises(ValueError, match=r"seq_lens\[0\] = -1"):
        attend(*problem.args, **problem.options, validate=True)
