"""Threshold skipping makes the decisions of the sequential float64 walk, and renormalises."""

import dataclasses
import functools
import math

import pytest
import torch

import attnsieve
from attnsieve import reference
from cases import DTYPES, HEAD_DIMS, Case, build, device_of, every_backend, refuses_votes
from layouts import sequences_of, to_pages
from numerics import assert_attention_close, assert_bitwise, pytorch_same_dtype

# A decision this close to ln(threshold) may legitimately fall either way in float32.
MARGIN = 1e-3


def walk_cases(backend):
    cases = []
    for i, dtype in enumerate(DTYPES[device_of(backend)]):
        common = dict(dtype=dtype, seed=20 + i, backend=backend)
        case = functools.partial(Case, device_of(backend), **common)
        cases += [
            case(320, 700, (4, 2)),
            case(513, 513, (4, 4), causal=True),
            case(200, 640, (2, 1), causal=True, window=(300, 0), head_dim=128),
            case(384, 640, (4, 2), density=0.6, block=(64, 64)),
            case(384, 640, (4, 2), density=0.6, block=(128, 64), causal=True),
            case(257, 900, (4, 1), density=0.7, block=(64, 128), list_heads="kv"),
            case(300, 640, (2, 2), density=0.5, block=(128, 128), list_heads="one"),
            case(300, 900, (2, 2), density=0.9, block=(128, 16), causal=True),
            case(200, 900, (2, 1), density=0.8, block=(64, 32), window=(600, 0)),
        ]
        for head_dim in {96, 256}.intersection(HEAD_DIMS[backend]):
            cases += [
                case(320, 700, (4, 2), head_dim=head_dim, causal=True),
                case(384, 640, (4, 2), head_dim=head_dim, density=0.6, block=(128, 64)),
            ]
    return cases


WALK_CASES = every_backend(walk_cases)
THRESHOLDS = (1e-3, 0.2, 2.0, 20.0)


@functools.lru_cache(maxsize=8)
def peaked(case):
    """The case with keys whose size differs from tile to tile, so that some tiles do not matter."""
    problem = build(case)
    generator = torch.Generator().manual_seed(case.seed)
    tiles = -(-case.seqlen_k // 64)
    size = (3 * torch.rand(case.batch, case.heads[1], tiles, 1, generator=generator)) ** 2
    size = size.repeat_interleave(64, dim=2)[:, :, : case.seqlen_k].to(case.device)
    problem.k = (problem.k.float() * size * 0.4).to(case.dtype)
    return problem


def _walk(problem, threshold, skip_block):
    masks = {name: problem.options[name] for name in ("causal", "window")}
    return reference.threshold_walk(
        problem.q, problem.k, threshold, index=problem.index, skip_block=skip_block, **masks
    )


@pytest.mark.parametrize("skip_block", [64, 128])
@pytest.mark.parametrize("case", WALK_CASES)
def test_decisions_follow_the_sequential_walk(case, skip_block):
    problem = peaked(case)
    skipped = total = 0
    for threshold in THRESHOLDS:
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
        walk = _walk(problem, threshold, skip_block)
        out, lse, counters = attention()
        assert counters.dtype == torch.int64 and counters.shape == (*problem.q.shape[:2], 2)
        clear = walk.margin > MARGIN
        assert clear.float().mean() > 0.5, "the case decides too little away from the threshold"
        assert_bitwise(counters[..., 1], walk.counters[..., 1], f"totals at {threshold}")
        assert_bitwise(counters[clear], walk.counters[clear], f"counters at {threshold}")
        ref = reference.threshold_attention(
            *problem.args[:3],
            threshold,
            index=problem.index,
            skip_block=skip_block,
            return_lse=True,
            **problem.options,
        )
        pt = pytorch_same_dtype(*problem.args[:3], walk.times)
        here = [x[clear] for x in (out, lse, *ref, *pt)]
        assert_attention_close(*here[:2], here[2:4], here[4:], f"{threshold} {case!r}")
        skipped += int(walk.counters[..., 0].sum())
        total += int(walk.counters[..., 1].sum())
    assert 0.05 < skipped / total < 0.95, f"{skipped} of {total} skipped: the case tests nothing"


@pytest.mark.parametrize("skip_block", [64, 128])
@pytest.mark.parametrize("case", WALK_CASES)
def test_threshold_zero_is_bitwise_none(case, skip_block):
    problem = peaked(case)
    run = functools.partial(
        attnsieve.threshold_attention,
        *problem.args[:3],
        index=problem.index,
        skip_block=skip_block,
        return_lse=True,
        **problem.options,
    )
    if refuses_votes(case.head_dim, skip_block, functools.partial(run, threshold=0.0)):
        return
    out, lse, counters = run(threshold=0.0, return_counters=True)
    assert_bitwise((out, lse), run(threshold=None), "threshold 0 against None")
    assert counters[..., 0].sum() == 0
    assert_bitwise(counters[..., 1], _walk(problem, 0.0, skip_block).counters[..., 1], "totals")


@pytest.mark.parametrize("case", WALK_CASES)
def test_threshold_infinite_keeps_rows_alive(case):
    """Only a row that has seen nothing yet may veto, so little more than the first tile stays."""
    problem = peaked(case)
    attention = functools.partial(
        attnsieve.threshold_attention,
        *problem.args[:3],
        math.inf,
        index=problem.index,
        return_counters=True,
        **problem.options,
    )
    if refuses_votes(case.head_dim, 128, attention):
        return
    _, counters = attention()
    assert_bitwise(counters, _walk(problem, math.inf, 128).counters, "counters at infinity")
    if not case.causal and case.window is None:
        groups = -(-case.seqlen_q // 64)
        kept = counters[..., 1] - counters[..., 0]
        assert (kept <= groups).all(), "without a causal mask one tile serves every row"


def test_first_visited_tile_is_the_last_in_position(device):
    """At an infinite threshold the result is attention over the last tile alone."""
    problem = build(Case(device, 64, 512, (2, 1)))
    for skip_block in (64, 128):
        out = attnsieve.threshold_attention(*problem.args[:3], math.inf, skip_block=skip_block)
        last = [x[:, :, -skip_block:] for x in (problem.k, problem.v)]
        assert_bitwise(out, attnsieve.block_sparse_attention(problem.q, *last), f"{skip_block}")


def test_first_visited_chunk_of_a_list_takes_the_remainder(device):
    """Three kept units in chunks of two: the last chunk holds one unit and is visited first."""
    problem = build(Case(device, 64, 512, (1, 1), batch=1))
    mask = torch.zeros(1, 8, dtype=torch.bool, device=device)
    mask[0, [1, 4, 6]] = True
    index = attnsieve.BlockIndex.from_dense(mask, 64, 64)
    out, counters = attnsieve.threshold_attention(
        *problem.args[:3], math.inf, index=index, skip_block=128, return_counters=True
    )
    assert counters.tolist() == [[[1, 2]]]
    last = [x[:, :, 6 * 64 : 7 * 64] for x in (problem.k, problem.v)]
    assert_bitwise(out, attnsieve.block_sparse_attention(problem.q, *last), "last unit alone")


def test_groups_of_a_row_share_one_cut(device):
    """Kept units 0, 1, 3 in chunks of two: the group that does not see 3 starts with [0, 1]."""
    problem = build(Case(device, 128, 256, (1, 1), batch=1))
    mask = torch.tensor([[True, True, False, True]], device=device)
    index = attnsieve.BlockIndex.from_dense(mask, 128, 64)
    out, counters = attnsieve.threshold_attention(
        *problem.args[:3], math.inf, index=index, causal=True, return_counters=True
    )
    assert counters.tolist() == [[[1, 3]]]
    first = [x[:, :, :128] for x in (problem.k, problem.v)]
    expected = attnsieve.block_sparse_attention(problem.q[:, :, :64], *first)
    torch.testing.assert_close(out[:, :, :64], expected, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("block", [None, (64, 64), (128, 16)], ids=str)
@pytest.mark.parametrize("page_size", [16, 128])
def test_pages_decide_as_their_sequences(device, page_size, block):
    case = Case(device, 200, 640, (2, 1), causal=True, batch=3, seed=14)
    if block is not None:
        case = dataclasses.replace(case, density=0.6, block=block)
    paged = to_pages(peaked(case), [640, 333, 0], page_size)
    _, counters = attnsieve.threshold_attention(
        *paged.args[:3], 0.3, index=paged.index, return_counters=True, **paged.options
    )
    for b, (_, one) in enumerate(sequences_of(paged)):
        walk = _walk(one, 0.3, 128)
        assert (walk.margin > MARGIN).all()
        assert_bitwise(counters[b], walk.counters[0], f"sequence {b}")
    assert 0 < counters[..., 0].sum() < counters[..., 1].sum()


def test_keys_without_a_page_never_veto(device):
    """Their tiles count, but nothing in them holds a row back; one of them is visited first."""
    problem = build(Case(device, 64, 512, (1, 1), batch=1))
    paged = to_pages(problem, [512], 64)
    paged.options["block_table"][0, [3, 7]] = -1
    walk = attnsieve.threshold_attention(
        *paged.args[:3], math.inf, skip_block=64, return_counters=True, **paged.options
    )
    assert walk[1].tolist() == [[[6, 8]]], "tile 7 first, then tile 0 for rows without a maximum"
    first = [x[:, :, :64] for x in (problem.k, problem.v)]
    expected = attnsieve.block_sparse_attention(problem.q, *first)
    torch.testing.assert_close(walk[0], expected, rtol=2**-7, atol=2**-8)


def test_rows_that_see_nothing_in_a_tile_never_veto(device):
    """Window rows above a tile's last visible key must not keep it alive."""
    case = Case(device, 128, 512, (1, 1), batch=1, window=(40, 0), seed=3)
    problem = peaked(case)
    for threshold in (0.5, 8.0):
        walk = _walk(problem, threshold, 64)
        _, counters = attnsieve.threshold_attention(
            *problem.args[:3],
            threshold,
            skip_block=64,
            return_counters=True,
            **problem.options,
        )
        assert (walk.margin > MARGIN).all()
        assert_bitwise(counters, walk.counters, f"threshold {threshold}")


def test_nan_logits_veto(device):
    """A tile with a NaN logit is attended: skipping it would hide the NaN."""
    problem = build(Case(device, 64, 512, (1, 1), batch=1))
    problem.k[0, 0, 100] = torch.nan
    out, counters = attnsieve.threshold_attention(
        *problem.args[:3], math.inf, skip_block=64, return_counters=True
    )
    assert out.isnan().all()
    assert counters[0, 0, 0] >= 1, "tile 0 comes before the NaN and is skipped"


def test_threshold_tensor_holds_one_value_per_sequence(device):
    problem = peaked(Case(device, 192, 512, (2, 2), batch=3, seed=11))
    values = torch.tensor([0.0, 0.3, 4.0], device=device)
    out, counters = attnsieve.threshold_attention(*problem.args[:3], values, return_counters=True)
    for b, value in enumerate(values.tolist()):
        one = [x[b : b + 1] for x in problem.args[:3]]
        alone = attnsieve.threshold_attention(*one, value, return_counters=True)
        assert_bitwise((out[b : b + 1], counters[b : b + 1]), alone, f"sequence {b}")
    assert counters[0, :, 0].sum() == 0 and counters[2, :, 0].sum() > 0


def test_varlen_counters_are_those_of_each_sequence(device):
    problem = peaked(Case(device, 192, 512, (2, 1), batch=2, seed=12))
    alone = attnsieve.threshold_attention(*problem.args[:3], 0.3, return_counters=True, causal=True)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in problem.args[:3])
    cu_q, cu_k = (torch.tensor([0, n, 2 * n], device=device).int() for n in (192, 512))
    out, counters = attnsieve.threshold_attention(
        q, k, v, 0.3, causal=True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_counters=True
    )
    assert_bitwise(counters, alone[1], "counters")
    assert_bitwise(out.unflatten(0, (2, 192)).transpose(1, 2), alone[0], "out")


def test_sink_takes_no_part_in_decisions(device):
    problem = peaked(Case(device, 192, 512, (2, 1), seed=13))
    run = functools.partial(
        attnsieve.threshold_attention, *problem.args[:3], 0.3, return_counters=True
    )
    sink = torch.full((2,), 50.0, device=device)
    (_, plain), (out, sunk) = run(), run(sink=sink)
    assert plain[..., 0].sum() > 0
    assert_bitwise(plain, sunk, "counters with and without a sink")
    assert out.abs().max() < 1e-2, "a sink of 50 takes nearly all mass"
