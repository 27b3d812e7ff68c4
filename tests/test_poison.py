"""Memory that was not selected never changes a result: fill it with NaN, Inf and 1e4."""

import math

import pytest
import torch

import attnsieve
from attnsieve import BlockIndex
from cases import BAD_IDS, BLOCKS, DTYPES, Case, build, head_dims, randn, random_index
from layouts import build_layout, deal_pages, fill_pages, to_pages
from numerics import assert_bitwise

attend = attnsieve.block_sparse_attention
CANARY_BYTES = 4096
FILLS = (math.nan, math.inf, 1e4)


class Guarded:
    """A copy of a tensor in the middle of a larger buffer whose margins must stay as they are."""

    def __init__(self, tensor, fill=math.nan):
        margin = CANARY_BYTES // tensor.element_size()
        fill = fill if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
        self.buffer = torch.full(
            (tensor.numel() + 2 * margin,), fill, dtype=tensor.dtype, device=tensor.device
        )
        self.view = self.buffer[margin:-margin].view(tensor.shape)
        self.view.copy_(tensor)
        self.before = self.buffer.clone()

    def assert_untouched(self, what):
        assert_bitwise(self.buffer, self.before, f"{what} or the memory around it was written")


def guarded_call(problem, fill=math.nan, **options):
    """The call with every operand inside canaries; none of them may be written."""
    guards = {name: Guarded(getattr(problem, name), fill) for name in ("q", "k", "v")}
    index = problem.index
    if index is not None:
        guards |= {name: Guarded(getattr(index, name)) for name in ("counts", "columns")}
        lists = guards["counts"].view, guards["columns"].view
        index = BlockIndex(*lists, index.block_q, index.block_k)
    views = [guards[name].view for name in ("q", "k", "v")]
    result = attend(*views, index, return_lse=True, **(problem.options | options))
    for name, guard in guards.items():
        guard.assert_untouched(name)
    return result


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("seqlens", [(1, 1), (9, 503), (65, 129), (200, 320), (129, 1001)], ids=str)
def test_memory_around_the_tensors(device, seqlens, fill):
    """Ragged tails must not be read past their end, or must be read without effect."""
    for density in (None, 0.7):
        problem = build(Case(device, *seqlens, causal=True, density=density, block=(64, 128)))
        expected = attend(*problem.args, causal=True, return_lse=True)
        assert_bitwise(guarded_call(problem, fill), expected, f"density {density}")


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_blocks_that_no_list_names(device, block, fill):
    problem = build(Case(device, 300, 700, (4, 2), density=0.5, block=block, list_heads="kv"))
    num_k_blocks = -(-700 // block[1])
    mask = problem.index.to_dense(num_k_blocks)
    mask[..., 1::3] = False
    problem.index = BlockIndex.from_dense(mask, *block)
    expected = attend(*problem.args, return_lse=True)
    unused = (~mask.any(dim=2)).repeat_interleave(block[1], dim=2)[:, :, :700]
    problem.k[unused], problem.v[unused] = fill, fill
    assert unused.any()
    assert_bitwise(attend(*problem.args, return_lse=True), expected, f"fill {fill}")


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("block", [None, *BLOCKS], ids=str)
def test_masked_keys_inside_visited_tiles(device, block, fill):
    """A key after the row, in the same tile: neither its logit nor its value may leak.

    With a block the tiles are those of a full list, and rows of one q-block part company within it.
    """
    lists = {} if block is None else dict(block=block, density=1.0)
    for head_dim in head_dims(device):
        problem = build(Case(device, 150, 150, head_dim=head_dim, causal=True, **lists))
        expected = attend(*problem.args, causal=True, return_lse=True)
        problem.k[:, :, 100:], problem.v[:, :, 100:] = fill, fill
        actual = attend(*problem.args, causal=True, return_lse=True)
        for got, want in zip(actual, expected, strict=True):
            what = f"rows before the poison, head_dim {head_dim}"
            assert_bitwise(got[:, :, :100], want[:, :, :100], what)


@pytest.mark.parametrize("fill", FILLS)
def test_keys_outside_every_window(device, fill):
    problem = build(Case(device, 100, 500, window=(30, 10)))
    expected = attend(*problem.args, window=(30, 10), return_lse=True)
    problem.k[:, :, :370], problem.v[:, :, :370] = fill, fill
    assert_bitwise(attend(*problem.args, window=(30, 10), return_lse=True), expected, "window")


@pytest.mark.parametrize("fill", FILLS)
def test_neighbours_in_the_batch(device, fill):
    problem = build(Case(device, 130, 200, batch=3, density=0.6))
    expected = attend(*problem.args, return_lse=True)
    for x in (problem.q, problem.k, problem.v):
        x[0], x[2] = fill, fill
    actual = attend(*problem.args, return_lse=True)
    assert_bitwise([x[1] for x in actual], [x[1] for x in expected], "the sequence between")


@pytest.mark.parametrize("fill", FILLS)
def test_neighbours_in_a_varlen_batch(device, fill):
    dtype = DTYPES[device][0]
    q = randn((300, 2, 64), dtype, device)
    k, v = (randn((300, 2, 64), dtype, device, s) for s in (1, 2))
    cu = torch.tensor([0, 100, 171, 300], device=device).int()
    options = dict(causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True)
    expected = attend(q, k, v, **options)
    for x in (q, k, v):
        x[:100], x[171:] = fill, fill
    actual = attend(q, k, v, **options)
    middle = [x[100:171] for x in actual], [x[100:171] for x in expected]
    assert_bitwise(*middle, "the sequence between")


@pytest.mark.parametrize("fill", FILLS)
def test_tokens_after_the_last_sequence(device, fill):
    """cu_seqlens may cover less than the tensors; the rest is padding."""
    dtype = DTYPES[device][0]
    q, k, v = (randn((300, 2, 64), dtype, device, s) for s in range(3))
    cu = torch.tensor([0, 100, 201], device=device).int()
    options = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True)
    expected = attend(q[:201].clone(), k[:201].clone(), v[:201].clone(), **options)
    for x in (q, k, v):
        x[201:] = fill
    actual = attend(q, k, v, **options)
    assert_bitwise([x[:201] for x in actual], list(expected), "padding behind the batch")


def test_index_tails(device):
    problem = build(Case(device, 300, 700, density=0.5))
    expected = attend(*problem.args, return_lse=True)
    index = problem.index
    used = torch.arange(index.capacity, device=device) < index.counts.unsqueeze(-1)
    for value in (*BAD_IDS, 0, 3):
        columns = torch.where(used, index.columns, value)
        poisoned = BlockIndex(index.counts, columns, 64, 64)
        actual = attend(*problem.args[:3], poisoned, return_lse=True)
        assert_bitwise(actual, expected, f"tail {value}")


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("page_size", [16, 48, 128])
@pytest.mark.parametrize("density", [None, 0.6])
def test_pages_and_rows_that_no_sequence_owns(device, density, page_size, fill):
    """Free pages, rows of a last page past its sequence, and what a table says past it."""
    block = (64, 32) if page_size == 48 else (128, 64)
    case = Case(device, 130, 300, batch=3, causal=True, density=density, block=block)
    lengths = [300, 161, 0]
    expected, actual = (
        attend(*paged.args, return_lse=True, **paged.options)
        for paged in (to_pages(build(case), lengths, page_size, fill=f) for f in (0.0, fill))
    )
    assert_bitwise(actual, expected, f"fill {fill}")
    assert actual[0].isfinite().all() and (actual[1][2] == -math.inf).all()


@pytest.mark.parametrize("fill", FILLS)
def test_pages_that_no_list_names(device, fill):
    """Owned pages of a sequence, between listed ones, that no row of the index keeps."""
    problem = build(Case(device, 130, 512, (2, 2)))
    mask = torch.zeros(3, 8, dtype=torch.bool, device=device)
    mask[:, [0, 3, 6]] = True
    problem.index = BlockIndex.from_dense(mask, 64, 64)
    problem.index = BlockIndex(
        *(x.expand(2, *x.shape[1:]) for x in (problem.index.counts, problem.index.columns)), 64, 64
    )
    paged = to_pages(problem, [512, 200], 16)
    expected = attend(*paged.args, return_lse=True, **paged.options)
    listed = mask[0].repeat_interleave(4)
    table = paged.options["block_table"]
    for page in (*table[0, ~listed].tolist(), *table[1, :13][~listed[:13]].tolist()):
        paged.k[page], paged.v[page] = fill, fill
    assert_bitwise(attend(*paged.args, return_lse=True, **paged.options), expected, f"{fill}")


def test_memory_around_pages_and_tables(device):
    """Caches, tables and lengths inside canaries; the allocations are exact."""
    for layout, density in (("paged", None), ("paged_varlen", 0.7)):
        problem = build_layout(
            Case(device, 130, 333, causal=True, density=density, layout=layout, page_size=48)
        )
        options = dict(problem.options)
        expected = attend(*problem.args, **options, return_lse=True)
        guards = {name: Guarded(options[name]) for name in ("block_table", "seq_lens")}
        problem.options |= {name: guard.view for name, guard in guards.items()}
        assert_bitwise(guarded_call(problem), expected, layout)
        for name, guard in guards.items():
            guard.assert_untouched(name)


def test_neighbours_in_a_paged_batch(device):
    problem = build(Case(device, 100, 256, batch=3))
    lengths = [256, 130, 77]
    table = deal_pages(lengths, 4, 64)
    pages = dict(block_table=table.to(device), seq_lens=torch.tensor(lengths, device=device).int())
    caches = [fill_pages(x, lengths, table, 64) for x in (problem.k, problem.v)]
    expected = attend(problem.q, *caches, **pages, return_lse=True)
    for page in (*table[0].tolist(), *table[2, :2].tolist()):
        for cache in caches:
            cache[page] = math.nan
    actual = attend(problem.q, *caches, **pages, return_lse=True)
    assert_bitwise([x[1] for x in actual], [x[1] for x in expected], "the sequence between")


@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_threshold_path(device, threshold):
    """Poison under a mask must not influence decisions either."""
    problem = build(Case(device, 150, 400, causal=True, window=(120, 0)))
    run = dict(threshold=threshold, return_lse=True, return_counters=True, **problem.options)
    expected = attnsieve.threshold_attention(*problem.args[:3], **run)
    problem.k[:, :, :130], problem.v[:, :, :130] = math.nan, math.nan
    actual = attnsieve.threshold_attention(*problem.args[:3], **run)
    assert_bitwise(actual, expected, "keys outside every window")


def test_uninitialised_outputs(device):
    """Outputs start as NaN: torch fills new memory, and freed memory is left full of it."""
    problem = build(Case(device, 200, 300, causal=True, density=0.3))
    expected = attend(*problem.args, causal=True, return_lse=True)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    dirty = [torch.full_like(x, math.nan) for x in expected for _ in range(4)]
    del dirty
    assert_bitwise(attend(*problem.args, causal=True, return_lse=True), expected, "outputs")
    walk = dict(threshold=0.1, return_lse=True, return_counters=True, causal=True)
    first = attnsieve.threshold_attention(*problem.args[:3], **walk)
    dirty = torch.full((64, 2, 4, 2), -1, device=device)
    del dirty
    again = attnsieve.threshold_attention(*problem.args[:3], **walk)
    assert_bitwise(again, first, "outputs and counters")


@pytest.mark.parametrize("fill", FILLS)
def test_scores_of_blocks_that_a_row_cannot_see(device, fill):
    scores = randn((1, 2, 10, 10), device=device)
    expected = attnsieve.select_from_scores(scores, 640, 640, topk=3, causal=True)
    above = torch.ones(10, 10, dtype=torch.bool, device=device).triu(1)
    spoiled = scores.masked_fill(above, fill)
    actual = attnsieve.select_from_scores(spoiled, 640, 640, topk=3, causal=True)
    assert_bitwise(actual.columns, expected.columns, f"fill {fill}")
    mass = dict(top_p=0.8, causal=True)
    expected = attnsieve.select_from_scores(scores, 640, 640, **mass)
    actual = attnsieve.select_from_scores(spoiled, 640, 640, **mass)
    assert_bitwise(actual.columns, expected.columns, f"top_p, fill {fill}")


@pytest.mark.parametrize("fill", FILLS)
def test_empty_states_of_a_merge(device, fill):
    """A state with lse = -inf holds nothing, whatever its out says."""
    outs = randn((2, 3, 70, 64), DTYPES[device][0], device)
    lses = randn((2, 3, 70), device=device, seed=1)
    lses[1] = -math.inf
    outs[1] = fill
    assert_bitwise(attnsieve.merge_states(outs, lses), (outs[0], lses[0]), "empty state")


def test_random_index_of_another_problem_is_memory_safe(device):
    """Lists full of garbage: any result, but no access outside the tensors and no hang."""
    problem = build(Case(device, 200, 300))
    shape = (2, 4, 4, 9)
    generator = torch.Generator().manual_seed(0)
    columns = torch.randint(-(2**31), 2**31 - 1, shape, generator=generator).int().to(device)
    counts = torch.randint(-(2**31), 2**31 - 1, shape[:3], generator=generator).int().to(device)
    problem.index = BlockIndex(counts, columns, 64, 64)
    out, lse = guarded_call(problem)
    assert out.isfinite().all() and not lse.isnan().any()
    problem.index = random_index(2, 4, 200, 3000, density=1.0, device=device)
    guarded_call(problem)
