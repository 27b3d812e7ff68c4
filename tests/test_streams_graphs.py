"""Ops run on the current stream, never synchronise, and can be captured and replayed."""

import dataclasses
import functools

import pytest
import torch

import attnsieve
from attnsieve import BlockIndex
from cases import Case, build, capture, randn, random_index
from layouts import build_layout
from numerics import assert_bitwise, check_against_oracle

pytestmark = pytest.mark.usefixtures("cuda_backend")

SLEEP_CYCLES = 200_000_000  # about 0.1 s


def attend(problem):
    options = dict(return_lse=True, **problem.options)
    return attnsieve.block_sparse_attention(*problem.args, **options)


def walk(problem):
    options = dict(return_lse=True, return_counters=True, index=problem.index, **problem.options)
    return attnsieve.threshold_attention(*problem.args[:3], 0.3, **options)


def select(problem):
    index = attnsieve.select_blocks(problem.q, problem.k, topk=3, causal=True)
    return index.counts, index.columns


def select_and_attend(problem):
    index = attnsieve.select_blocks(problem.q, problem.k, top_p=0.7, causal=True)
    return attnsieve.block_sparse_attention(*problem.args[:3], index, causal=True, return_lse=True)


def attend_small_blocks(problem):
    """The same lists read as blocks of 16 keys."""
    index = BlockIndex(problem.index.counts, problem.index.columns, 64, 16)
    return attnsieve.block_sparse_attention(*problem.args[:3], index, causal=True, return_lse=True)


def merge(problem):
    out, lse = attend(problem)
    return attnsieve.merge_states(torch.stack([out, 2 * out]), torch.stack([lse, lse + 1]))


def select_tokens(problem):
    """The first column of k as scores."""
    scores = problem.k[..., 0].float()
    best = attnsieve.select_topk(scores, 50, recent=2)
    above, passed = attnsieve.select_threshold(scores, 0.3, 60, sink=1)
    return best.indices, best.counts, above.indices, above.counts, passed


def decode(problem):
    """The last rows over everything, and over the tokens that the first column of k selects."""
    q, k, v = problem.args[:3]
    rows = q[:, :, -3:].contiguous()
    index = attnsieve.select_topk(k[..., 0].float(), 200)
    whole = attnsieve.decode(rows, k, v, return_lse=True)
    return *whole, *attnsieve.decode(rows, k, v, index, recent=20, num_splits=3, return_lse=True)


def skip_tiles(problem):
    """A decode step that skips tiles, in one phase and in two."""
    q, k, v = problem.args[:3]
    options = dict(phase="decode", num_splits=2, skip_block=64, return_lse=True)
    options |= dict(return_counters=True, causal=True)
    run = functools.partial(attnsieve.threshold_attention, q[:, :, -3:], 3 * k, v, **options)
    return *run(8.0), *run(q[:, :, 0, 0].abs().float(), two_phase=True)


def score_tokens(problem):
    """Both kernels of the scorer: a decoding step, and several rows with a softmax."""
    q, k = problem.args[:2]
    options = dict(head_reduce="max", num_out_heads=k.shape[1])
    step = attnsieve.proxy_scores(q[:, :, -1:], k, **options)
    mass = attnsieve.proxy_scores(q[:, :, -3:], k, softmax=True, causal=True, **options)
    return step, mass, attnsieve.proxy_scores(q[:, :, -3:], k, page_reduce="max", page_size=100)


def append(problem):
    """Fresh caches: what is written does not depend on the call before."""
    q, k, v = problem.args[:3]
    caches = [torch.zeros_like(x) for x in (k, v)]
    bounds = k.new_zeros(k.shape[0], 32, k.shape[1], 2, k.shape[3])
    lens = torch.full((k.shape[0],), 450, device="cuda", dtype=torch.int32)
    side = dict(projection=q[0, : k.shape[1], :64], proxy=torch.zeros_like(caches[0]))
    new = (x[:, :, :450] for x in (k, v))
    attnsieve.append_kv(*new, *caches, seq_lens=lens, bounds=bounds, page_size=16, **side)
    return *caches, bounds, side["proxy"]


def quantize(problem):
    coded = [attnsieve.quantize_blocks(problem.k, bits=n, scale_rows=32) for n in (8, 4)]
    return tuple(x for c in coded for x in (c.codes, c.scales, c.mean))


def estimate(problem):
    options = dict(tau=0.5, block_k=16, local_tokens=64, row_stride=2, causal=True)
    found = attnsieve.quantized_estimate_attention(
        *problem.args[:3], return_lse=True, return_index=True, **options
    )
    out, lse, index = found
    coded = (attnsieve.quantize_blocks(x, scale_rows=16) for x in problem.args[:2])
    masses = attnsieve.estimate_block_scores(*coded, threshold=lse, reduce="sum", causal=True)
    return out, lse, index.counts, index.columns, masses


def low_rank(problem):
    """The last row over the tokens whose first 16 numbers score best."""
    q, k, v = problem.args[:3]
    projection = q[0, : k.shape[1], : q.shape[3], :16]
    options = dict(projection=projection, proxy=k[..., :16].contiguous(), k=100, return_lse=True)
    out, index, lse = attnsieve.low_rank_attention(
        q[:, :, -1:].contiguous(), k, v, return_index=True, **options
    )
    return out, lse, index.indices, index.counts


def fetch(problem):
    """Two steps of a working set over keys and values; the lists are the first columns' of k."""
    _, k, v = problem.args[:3]
    held = attnsieve.WorkingSet(*k.shape[:2], 100, k.shape[3], dtype=k.dtype, device="cuda")
    places = []
    for column in (0, 1):
        index = attnsieve.select_topk(k[..., column].float(), 80)
        places.append(held.fetch(index, k, v).indices)
    return *places, held.slots, held.k, held.v, held.moved


OPS = (attend, walk, select, select_and_attend, attend_small_blocks, merge, select_tokens, decode)
OPS = (*OPS, skip_tiles, score_tokens, append, quantize, estimate, low_rank, fetch)


def problem_of(seed):
    return build(Case("cuda", 300, 500, causal=True, density=0.4, seed=seed))


@pytest.mark.parametrize("op", OPS, ids=lambda f: f.__name__)
def test_side_stream_waits_for_its_own_work(op):
    """Inputs are written behind a sleep on a side stream: a default-stream launch reads zeros."""
    source = problem_of(1)
    expected = op(source)
    torch.cuda.synchronize()
    late = problem_of(2)
    for x in late.args[:3]:
        x.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        for to, x in zip(late.args[:3], source.args[:3], strict=True):
            to.copy_(x)
        late.index.counts.copy_(source.index.counts)
        late.index.columns.copy_(source.index.columns)
        actual = op(late)
    stream.synchronize()
    assert_bitwise(actual, expected, "side stream")


@pytest.mark.parametrize("op", OPS, ids=lambda f: f.__name__)
def test_no_synchronisation(op):
    problem = problem_of(1)
    op(problem)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda._sleep(SLEEP_CYCLES)
    op(problem)
    busy = not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert busy, "the call waited for the sleep in front of it"


def _refill(static, seed):
    fresh = problem_of(seed)
    for to, x in zip(static.args[:3], fresh.args[:3], strict=True):
        to.copy_(x)
    static.index.counts.copy_(fresh.index.counts)
    static.index.columns.copy_(fresh.index.columns)
    return fresh


@pytest.mark.parametrize("op", OPS, ids=lambda f: f.__name__)
def test_graph_replay_with_new_values_and_new_lists(op):
    static = problem_of(1)
    graph, result = capture(op, static)
    for seed in (1, 2, 3):
        fresh = _refill(static, seed)
        graph.replay()
        torch.cuda.synchronize()
        assert_bitwise(result, op(fresh), f"replay with inputs {seed}")


def test_graph_replay_with_emptied_lists():
    static = problem_of(1)
    graph, (out, lse) = capture(attend, static)
    static.index.counts.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("density", [None, 0.4])
def test_more_work_items_than_the_gpu_holds(density):
    """384 tiles of 128 rows, handed out one by one where they are uneven: by every replay anew."""
    case = Case("cuda", 384, 256, (32, 8), causal=True, density=density, block=(128, 64), batch=4)
    problem = build(case)
    check_against_oracle(attnsieve.block_sparse_attention, problem, f"{case!r}")
    expected = attend(problem)
    graph, result = capture(attend, problem)
    for turn in range(3):
        for x in result:
            x.fill_(7)
        graph.replay()
        torch.cuda.synchronize()
        assert_bitwise(result, expected, f"replay {turn}")


def test_two_graphs_interleaved():
    first, second = problem_of(1), problem_of(2)
    graphs = [capture(walk, p) for p in (first, second)]
    expected = [walk(p) for p in (first, second)]
    for turn in (0, 1, 1, 0, 1):
        graph, result = graphs[turn]
        for x in result:
            x.fill_(7)
        graph.replay()
        torch.cuda.synchronize()
        assert_bitwise(result, expected[turn], f"graph {turn}")


def test_varlen_capture_with_new_lengths():
    q = torch.randn(400, 4, 64, device="cuda", dtype=torch.bfloat16)
    cu = torch.tensor([0, 100, 400], device="cuda").int()
    run = functools.partial(attnsieve.block_sparse_attention, q, q, q, causal=True)
    index = random_index(2, 4, 400, 400, density=0.7, device="cuda")

    def op(cu):
        return run(
            BlockIndex(index.counts, index.columns, 64, 64), cu_seqlens_q=cu, cu_seqlens_k=cu
        )

    graph, result = capture(op, cu)
    for middle in (1, 64, 333):
        cu.copy_(torch.tensor([0, middle, 400]))
        graph.replay()
        torch.cuda.synchronize()
        assert_bitwise(result, op(cu), f"second sequence at {middle}")


PAGED = dict(causal=True, layout="paged", page_size=64)


def _tensors(problem):
    pages = (problem.options[name] for name in ("block_table", "seq_lens"))
    lists = () if problem.index is None else (problem.index.counts, problem.index.columns)
    return (*problem.args[:3], *pages, *lists)


@pytest.mark.parametrize("op", [attend, walk], ids=lambda f: f.__name__)
@pytest.mark.parametrize("density", [None, 0.5])
@pytest.mark.parametrize("page_size", [16, 128])
def test_paged_capture_with_new_tables_and_lengths(op, density, page_size):
    case = Case("cuda", 300, 500, density=density, **(PAGED | dict(page_size=page_size)))
    static = build_layout(case)
    graph, result = capture(op, static)
    for seed in (1, 2, 3):
        fresh = build_layout(dataclasses.replace(case, seed=seed))
        for to, x in zip(_tensors(static), _tensors(fresh), strict=True):
            to.copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        assert_bitwise(result, op(fresh), f"replay with inputs {seed}")
    static.options["seq_lens"].zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert (result[0] == 0).all() and (result[1] == -torch.inf).all()


def test_pages_on_a_side_stream_and_without_synchronisation():
    source = build_layout(Case("cuda", 300, 500, density=0.5, **PAGED))
    expected = attend(source)
    late = build_layout(Case("cuda", 300, 500, density=0.5, seed=5, **PAGED))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP_CYCLES)
            for to, x in zip(_tensors(late), _tensors(source), strict=True):
                to.copy_(x)
            actual = attend(late)
            busy = not stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert busy, "the call waited for the sleep in front of it"
    assert_bitwise(actual, expected, "side stream")


def _cache_tensors(seed):
    """A cache of 8-key pages, lengths and new rows: all that a decoding step reads or writes."""
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randperm(80, generator=generator)[:60].int().view(2, 30)
    lengths = torch.randint(5, 240, (2,), generator=generator).int()
    k_cache, v_cache = (randn((80, 8, 2, 64), torch.bfloat16, seed=seed + s) for s in (1, 2))
    new = [randn((2, 2, 3, 64), torch.bfloat16, seed=seed + s) for s in (3, 4)]
    q = randn((2, 8, 1, 64), torch.bfloat16, seed=seed + 5)
    bounds = torch.zeros(80, 2, 2, 64, dtype=torch.bfloat16)
    pages[0, -1] = (-1, 80, 2**31 - 1)[seed % 3]
    return [x.cuda() for x in (*new, k_cache, v_cache, bounds, pages, lengths, q)]


def _decoding_step(k, v, k_cache, v_cache, bounds, table, seq_lens, q):
    where = dict(block_table=table, seq_lens=seq_lens)
    attnsieve.append_kv(k, v, k_cache, v_cache, bounds=bounds, **where)
    reduced = dict(head_reduce="max", num_out_heads=2)
    pages = attnsieve.proxy_scores(q, bounds, element="bounds", page_size=8, **where, **reduced)
    tokens = attnsieve.proxy_scores(
        q, k_cache, softmax=True, page_reduce="sum", page_size=8, **where
    )
    index = attnsieve.select_topk(pages[:, 0], 6, seq_lens=seq_lens, page_size=8, recent=1)
    return pages, tokens, index.indices, index.counts


def test_cache_capture_with_new_lengths_tables_and_contents():
    static = _cache_tensors(0)
    graph, result = capture(_decoding_step, *static)
    for seed in (1, 2, 3):
        fresh = _cache_tensors(seed)
        for to, x in zip(static, fresh, strict=True):
            to.copy_(x)
        for tensors in (static, fresh) if seed == 3 else ():
            tensors[6].zero_()  # lengths
        graph.replay()
        torch.cuda.synchronize()
        assert_bitwise(result, _decoding_step(*fresh), f"replay with inputs {seed}")
        assert_bitwise(static, fresh, f"what replay {seed} wrote")
    assert (result[0] == -torch.inf).all() and (result[3] == 0).all()


def test_a_decoding_step_scores_in_one_launch():
    q, bounds = (
        randn((1, h, *n, 128), torch.bfloat16, "cuda") for h, n in ((32, (1,)), (500, (8, 2)))
    )
    options = dict(element="bounds", page_size=16, head_reduce="max", num_out_heads=8)
    attnsieve.proxy_scores(q, bounds, **options)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        attnsieve.proxy_scores(q, bounds, **options)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    if not names:
        pytest.skip("the profiler records no kernels here")
    kernels = [name for name in names if "scores" in name]
    assert len(kernels) == 1 and "stream_scores" in kernels[0], names


@pytest.mark.parametrize("offsets", [(0, 5, 4), (-3, 2, 900), (2**31 - 1, -(2**31), 7)])
def test_bad_offsets_of_packed_rows_are_memory_safe(offsets):
    """No host sees them: any rows may be written, where the table says, and nothing else."""
    k, v, k_cache, v_cache, bounds, table, lens, _ = _cache_tensors(1)
    packed = [x.transpose(1, 2).flatten(0, 1)[:4] for x in (k, v)]
    before = [x.clone() for x in (k_cache, v_cache)]
    side = dict(bounds=bounds, block_table=table, seq_lens=lens)
    cu = torch.tensor(offsets, device="cuda", dtype=torch.int32)
    attnsieve.append_kv(*packed, k_cache, v_cache, cu_seqlens=cu, **side)
    torch.cuda.synchronize()
    owned = torch.zeros(80, dtype=torch.bool, device="cuda")
    owned[table[(table >= 0) & (table < 80)].long()] = True
    assert_bitwise([k_cache[~owned], v_cache[~owned]], [x[~owned] for x in before])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_second_gpu_while_the_first_is_current():
    problem = problem_of(1)
    ops = (attend, walk, select, decode, skip_tiles)
    expected = [op(problem) for op in ops]
    other = build(Case("cuda:1", 300, 500, causal=True, density=0.4, seed=1))
    assert torch.cuda.current_device() == 0
    for op, wanted in zip(ops, expected, strict=True):
        actual = op(other)
        assert all(x.device.index == 1 for x in actual)
        assert_bitwise(tuple(x.to("cuda:0") for x in actual), wanted, op.__name__)
