"""Results are the same bits every time: repeats, neighbours in the batch, threads, streams."""

import pytest
import torch

import attnsieve
from cases import DTYPES, Case, build, randn
from layouts import build_layout
from numerics import assert_bitwise

REPEATS = 100


def problems(device, **options):
    for density in (None, 0.3):
        yield build(Case(device, 200, 450, dtype=DTYPES[device][0], density=density, **options))


def every_op(problem):
    """All results of all ops on one problem, as a flat tuple."""
    args, options = problem.args[:3], problem.options
    attended = attnsieve.block_sparse_attention(*problem.args, return_lse=True, **options)
    walked = attnsieve.threshold_attention(
        *args, 0.3, index=problem.index, return_lse=True, return_counters=True, **options
    )
    chosen = attnsieve.select_blocks(*args[:2], fraction=0.4, causal=options.get("causal", False))
    merged = attnsieve.merge_states(
        torch.stack([attended[0], walked[0]]), torch.stack([attended[1], walked[1]])
    )
    coded = attnsieve.quantize_blocks(args[1], scale_rows="key_quads")
    codes = (coded.codes, coded.scales, coded.mean)
    estimated, kept = attnsieve.quantized_estimate_attention(
        *args, tau=0.5, block_k=16, local_tokens=64, return_index=True
    )
    rows = attnsieve.quantize_blocks(args[0], smooth=False)
    masses = attnsieve.estimate_block_scores(
        rows, coded, threshold=attended[1], reduce="sum", causal=True
    )
    family = (estimated, kept.counts, kept.columns, masses)
    return (*attended, *walked, chosen.counts, chosen.columns, *merged, *codes, *family)


def test_repeats(device):
    for problem in problems(device, causal=True):
        expected = every_op(problem)
        for i in range(REPEATS // 10 if device == "cpu" else REPEATS):
            assert_bitwise(every_op(problem), expected, f"repeat {i}")


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_thread_count(threads):
    for problem in problems("cpu", causal=True):
        torch.set_num_threads(2)
        expected = every_op(problem)
        torch.set_num_threads(threads)
        assert_bitwise(every_op(problem), expected, f"{threads} threads")


@pytest.mark.parametrize("threads", [1, 5])
def test_thread_count_on_one_long_head(threads):
    """A single head is where a backend is tempted to split keys over threads."""
    problem = build(Case("cpu", 70, 3000, (1, 1), batch=1, dtype=torch.float32))
    expected = every_op(problem)
    torch.set_num_threads(threads)
    assert_bitwise(every_op(problem), expected, f"{threads} threads")


def test_batch_neighbours_in_pages_do_not_matter(device):
    for density in (None, 0.4):
        problem = build_layout(
            Case(device, 200, 450, batch=4, causal=True, density=density, layout="paged")
        )
        whole = attnsieve.block_sparse_attention(*problem.args, **problem.options, return_lse=True)
        for b in (0, 2):
            one, index = slice(b, b + 1), problem.index
            if index is not None:
                index = attnsieve.BlockIndex(index.counts[one], index.columns[one], 64, 64)
            pages = {n: problem.options[n][one] for n in ("block_table", "seq_lens")}
            args = problem.q[one], problem.k, problem.v, index
            alone = attnsieve.block_sparse_attention(
                *args, **(problem.options | pages), return_lse=True
            )
            assert_bitwise(alone, tuple(x[one] for x in whole), f"sequence {b} alone")


def test_batch_neighbours_do_not_matter(device):
    for problem in problems(device, batch=5):
        whole = attnsieve.block_sparse_attention(*problem.args, return_lse=True)
        for b in (0, 3):
            one = slice(b, b + 1)
            index = problem.index
            if index is not None:
                index = attnsieve.BlockIndex(index.counts[one], index.columns[one], 64, 64)
            operands = [x[one] for x in problem.args[:3]]
            alone = attnsieve.block_sparse_attention(*operands, index, return_lse=True)
            assert_bitwise(alone, tuple(x[one] for x in whole), f"sequence {b} alone")


def test_rows_do_not_depend_on_later_groups(device):
    """Cutting queries at a group boundary leaves the rows before it bit-equal (no causal mask)."""
    for problem in problems(device):
        if problem.index is not None:
            continue
        q, k, v = problem.args[:3]
        whole = attnsieve.block_sparse_attention(q, k, v)
        cut = attnsieve.block_sparse_attention(q[:, :, :128], k, v)
        assert_bitwise(cut, whole[:, :, :128], "first two groups alone")


def test_calls_in_between_leave_no_trace(device):
    """A, then other shapes and head layouts, then A again."""
    first, second = problems(device)
    expected = every_op(first)
    every_op(second)
    other = build(Case(device, 65, 129, (6, 1), dtype=DTYPES[device][-1], head_dim=128))
    every_op(other)
    assert_bitwise(every_op(first), expected, "A, B, A")


def test_streams(cuda_backend):
    for problem in problems("cuda", causal=True):
        expected = every_op(problem)
        torch.cuda.synchronize()
        for _ in range(10):
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                actual = every_op(problem)
            stream.synchronize()
            assert_bitwise(actual, expected, "side stream")


@pytest.mark.slow
def test_many_repeats_under_memory_pressure(cuda_backend):
    problem = build(Case("cuda", 1000, 1000, (8, 2), batch=60, density=0.3, causal=True))
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(int(free * 0.7), dtype=torch.uint8, device="cuda")
    expected = attnsieve.block_sparse_attention(*problem.args, causal=True, return_lse=True)
    for i in range(1000):
        actual = attnsieve.block_sparse_attention(*problem.args, causal=True, return_lse=True)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True)), f"repeat {i}"
    del ballast


def test_selection_of_ties_is_stable(device):
    scores = randn((2, 4, 20, 200), device=device).round()
    expected = attnsieve.select_from_scores(scores, 1280, 12800, topk=30)
    for _ in range(10):
        again = attnsieve.select_from_scores(scores, 1280, 12800, topk=30)
        assert_bitwise(again.columns, expected.columns, "ties")
