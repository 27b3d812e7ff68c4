"""What threshold skipping in decode promises: splits, groups, edges, isolation, two phases."""

import functools
import math

import pytest
import torch

import attnsieve
from attnsieve import TokenIndex, reference, reference_decode
from cases import DTYPES, capture, randn
from numerics import assert_bitwise
from threshold_cases import decode_case, peaked_keys
from token_lists import OnDevice

NAN, INF = math.nan, math.inf
BOTH = dict(return_lse=True, return_counters=True)


@pytest.fixture
def op(device):
    """threshold_attention in decode on a device, operands and results on the CPU."""
    functions = OnDevice(attnsieve, device)
    functions.dtype = DTYPES[device][0]
    functions.run = functools.partial(functions.threshold_attention, phase="decode", **BOTH)
    return functions


def problem(op, heads=(8, 2), rows=1, length=1500, batch=2, seed=0):
    q = randn((batch, heads[0], rows, 64), op.dtype, seed=seed)
    k = peaked_keys((batch, heads[1], length, 64), op.dtype, seed + 1)
    return q, k, randn(k.shape, op.dtype, seed=seed + 2)


def assert_close(got, want):
    for x, y in zip(got, want, strict=True):
        bound = 2e-6 if x.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(x.double(), y.double(), rtol=bound, atol=bound)


def attend_tiles(op, q, k, v, tiles, skip_block):
    """decode over the tiles alone."""
    index = torch.tensor(sorted(tiles), dtype=torch.int32).expand(q.shape[0], 1, -1)
    return op.decode(q, k, v, TokenIndex(index, page_size=skip_block), return_lse=True)


@pytest.mark.parametrize("two_phase", [False, True])
@pytest.mark.parametrize("rows", [1, 8])
def test_zero_keeps_everything(op, rows, two_phase):
    (q, k, v), options, _ = decode_case(dict(rows=rows, sink=True, cache=16, dtype=op.dtype))
    *got, counters = op.run(q, k, v, 0.0, num_splits=3, two_phase=two_phase, **options)
    del options["phase"]
    assert_close(got, reference_decode.decode(q, k, v, **options, return_lse=True))
    assert (counters[..., 0] == 0).all() and counters[..., 1].tolist() == [[12] * 8, [6] * 8]


def test_none_is_decode(op):
    (q, k, v), options, _ = decode_case(dict(cache=48, sink=True, dtype=op.dtype))
    got = op.threshold_attention(q, k, v, num_splits=3, **options, return_lse=True)
    del options["phase"]
    assert_bitwise(got, op.decode(q, k, v, num_splits=3, **options, return_lse=True))


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 16, 128])
@pytest.mark.parametrize("skip_block", [64, 128])
def test_infinity_keeps_the_first_tile_of_every_split(op, skip_block, num_splits):
    q, k, v = problem(op)
    *got, counters = op.run(q, k, v, INF, skip_block=skip_block, num_splits=num_splits)
    tiles = -(-1500 // skip_block)
    first = [*range(tiles)][-1:] + [*range(tiles - 1)]
    first = first[:num_splits]
    assert_close(got, attend_tiles(op, q, k, v, first, skip_block))
    assert (counters == torch.tensor([tiles - len(first), tiles])).all()


def test_splits_are_dealt_in_turn(op):
    """Two tiles matter, 2 and 3: with two splits each has one, after which it skips the rest."""
    q, k, v = randn((1, 1, 1, 64), op.dtype), torch.zeros(1, 1, 512, 64, dtype=op.dtype), None
    k[:, :, 128:192], k[:, :, 192:256] = q, 1.2 * q
    v = randn(k.shape, op.dtype, seed=1)
    # 7 0 1 2 3 4 5 6: the zeros of 4, 5 and 6 are far below the maximum of 3.
    *_, one = op.run(q, k, v, 0.01, skip_block=64, num_splits=1)
    # 7 1 3 5 and 0 2 4 6: 5 comes after 3, 4 and 6 after 2.
    *_, two = op.run(q, k, v, 0.01, skip_block=64, num_splits=2)
    # 7 4, 0 5, 1 6, 2, 3: nothing comes after 2 or 3.
    *_, five = op.run(q, k, v, 0.01, skip_block=64, num_splits=5)
    assert [x[0, 0].tolist() for x in (one, two, five)] == [[3, 8], [3, 8], [0, 8]]


@pytest.mark.parametrize("num_splits", [1, 3])
def test_every_sequence_and_head_has_its_own_lambda(op, num_splits):
    """Heads with KV heads of their own, each against a call with its number alone."""
    q, k, v = problem(op, heads=(3, 3))
    table = torch.tensor([[0.0, 0.01, 0.3], [4.0, 0.3, INF]])
    got = op.run(q, k, v, table, num_splits=num_splits)
    for b in range(2):
        for h in range(3):
            one = slice(b, b + 1), slice(h, h + 1)
            alone = [x[one].contiguous() for x in (q, k, v)]
            want = op.run(*alone, float(table[b, h]), num_splits=num_splits)
            assert_bitwise(tuple(x[one] for x in got), want, f"{b}, {h}")
    assert got[2][0, 0, 0] == 0 and (got[2][1, 1:, 0] > 0).all()


@pytest.mark.parametrize("rows, first_group", [(1, 16), (3, 5), (8, 2)])
def test_groups_are_of_at_most_sixteen_vectors(op, rows, first_group):
    """A head whose lambda is 0 holds back its group, and no other."""
    q, k, v = problem(op, heads=(40, 2), rows=rows)
    everyone = op.run(q, k, v, 4.0, num_splits=1)[2]
    assert (everyone[..., 0] > 0).all()
    table = torch.full((1, 40), 4.0)
    table[0, 0] = 0.0
    counters = op.run(q, k, v, table, num_splits=1)[2]
    assert (counters[:, :first_group, 0] == 0).all()
    assert_bitwise(counters[:, first_group:], everyone[:, first_group:])


@pytest.mark.parametrize("skip_block", [64, 128])
def test_ragged_lengths(op, skip_block):
    lengths = (0, 1, 127, 128, 129, 640, -7, 2**31 - 1)
    q, k, v = problem(op, batch=8, length=700)
    lens = torch.tensor(lengths, dtype=torch.int32)
    out, lse, counters = op.run(q, k, v, INF, seq_lens=lens, skip_block=skip_block, num_splits=2)
    tiles = [-(-min(max(n, 0), 700) // skip_block) for n in lengths]
    assert counters[:, 0, 1].tolist() == tiles
    assert counters[:, 0, 0].tolist() == [max(0, n - 2) for n in tiles]
    for b in (0, 6):
        assert (out[b] == 0).all() and (lse[b] == -INF).all()
    for b in (1, 2, 3, 4, 5, 7):
        one, length = slice(b, b + 1), min(lengths[b], 700)
        own = [x[one, :, :length].contiguous() for x in (k, v)]
        got = out[one], lse[one], counters[one]
        assert_bitwise(got, op.run(q[one], *own, INF, skip_block=skip_block, num_splits=2))


def test_rows_that_see_nothing_in_the_last_tile(op):
    """Its one key is the last row's alone: the other rows keep the next tile of the split too."""
    q, k, v = problem(op, rows=8, length=513)
    *_, causal = op.run(q, k, v, INF, skip_block=128, num_splits=1, causal=True)
    *_, full = op.run(q, k, v, INF, skip_block=128, num_splits=1, causal=False)
    assert causal[0, 0].tolist() == [3, 5] and full[0, 0].tolist() == [4, 5]


def test_keys_without_a_page_never_veto(op):
    """The first tile visited has none that exists: the next one is the first with a maximum."""
    (q, k, v), options, _ = decode_case(dict(cache=64, lengths=(512, 512), dtype=op.dtype))
    options["block_table"][:, [3, 7]] = -1
    *got, counters = op.run(q, k, v, INF, skip_block=64, num_splits=1, **options)
    assert (counters == torch.tensor([6, 8])).all()
    for two_phase in (False, True):
        run = functools.partial(op.run, q, k, v, skip_block=64, two_phase=two_phase, **options)
        for value in (0.0, torch.tensor(NAN), torch.tensor(-1.0)):  # no threshold skips nothing
            *_, counters = run(value, num_splits=1)
            assert (counters == torch.tensor([0, 8])).all()
    options["block_table"][:, 1:] = -1
    del options["phase"]
    assert_close(got, op.decode(q, k, v, **options, return_lse=True))


@pytest.mark.parametrize("two_phase", [False, True])
def test_nan_logits_veto(op, two_phase):
    q, k, v = problem(op, heads=(2, 2))
    k[0, 0, 700, 3] = NAN
    out, lse, counters = op.run(q, k, v, INF, num_splits=1, two_phase=two_phase)
    assert out[0, 0].isnan().all() and lse[0, 0].isnan().all()
    assert out[0, 1].isfinite().all() and out[1].isfinite().all()
    # One phase: tiles before the NaN are skipped, no later one is. Two phases: the maximum is NaN.
    assert counters[0, 0].tolist() == [0 if two_phase else 5, 12]


@pytest.mark.parametrize("heads", [(2, 2), (8, 2)])  # groups of 4 and of 16 query vectors
def test_values_stay_with_the_rows_that_see_them(op, heads):
    """NaN and Inf in the values of the last keys, which the first of four rows do not see."""
    q, k, v = problem(op, heads=heads, rows=4)
    v[:, :, -2:] = 0.0
    want, *_ = op.run(q, k, v, 0.3, num_splits=2, causal=True)
    v[:, :, -2], v[:, :, -1] = INF, NAN
    got, *_ = op.run(q, k, v, 0.3, num_splits=2, causal=True)
    assert_bitwise(got[:, :, :2], want[:, :, :2], "rows that see neither")
    assert not got[:, :, 2].isfinite().any() and got[:, :, 3].isnan().all()


@pytest.mark.parametrize("two_phase", [False, True])
def test_sink_takes_no_part_in_decisions(op, two_phase):
    q, k, v = problem(op)
    run = functools.partial(op.run, q, k, v, 0.3, num_splits=2, two_phase=two_phase)
    *_, plain = run()
    _, lse, sunk = run(sink=torch.full((8,), 90.0))
    assert 0 < plain[..., 0].sum() < plain[..., 1].sum()
    assert_bitwise(plain, sunk, "counters with and without a sink")
    assert (lse >= 90).all()


@pytest.mark.parametrize("two_phase", [False, True])
@pytest.mark.parametrize("cache", [None, 16])
def test_what_is_not_selected_never_matters(op, cache, two_phase):
    """Values of skipped tiles, and keys beyond the lengths, are NaN or zero: the same bits."""
    pick = dict(cache=cache, dtype=op.dtype, lengths=(1500, 333), heads=(2, 2))
    (q, k, v), options, _ = decode_case(pick)
    run = functools.partial(op.run, q, num_splits=2, two_phase=two_phase, **options)
    want = run(k, v, 0.3)
    assert all(x.isfinite().all() for x in want[:2])
    assert 0 < want[2][..., 0].sum() < want[2][..., 1].sum()
    assert_bitwise(run(k.nan_to_num(0.0), v.nan_to_num(0.0), 0.3), want, "beyond the lengths")
    if cache is None:
        names = ("causal", "seq_lens")
        own = {name: options[name] for name in names} | dict(num_splits=2, two_phase=two_phase)
        walk = reference.threshold_decode_walk(q, k, 0.3, **own)
        assert (walk.margin > 1e-3).all()
        v = v.masked_fill((walk.times[:, :, 0, :, None] == 0), NAN)
        assert_bitwise(run(k, v, 0.3), want, "skipped tiles")


@pytest.mark.parametrize("two_phase", [False, True])
def test_neighbours_threads_and_runs_do_not_matter(op, two_phase):
    """With num_splits pinned: its default is a function of the batch size."""
    (q, k, v), options, _ = decode_case(dict(cache=16, rows=2, dtype=op.dtype))
    run = functools.partial(op.run, num_splits=3, two_phase=two_phase)
    want = run(q, k, v, 0.3, **options)
    assert 0 < want[2][..., 0].sum() < want[2][..., 1].sum()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_bitwise(run(q, k, v, 0.3, **options), want, f"{threads} threads")
    for b in range(2):
        one = slice(b, b + 1)
        own = {n: x[one] if n in ("seq_lens", "block_table") else x for n, x in options.items()}
        assert_bitwise(run(q[one], k, v, 0.3, **own), tuple(x[one] for x in want), f"alone {b}")


def test_default_splits_are_threshold_splits(op):
    for heads, groups in (((8, 2), 4), ((40, 2), 12)):
        q, k, v = problem(op, heads=heads, length=5000)
        splits = attnsieve.threshold_splits(groups, 5000, 64)
        want = op.run(q, k, v, 0.3, skip_block=64, num_splits=splits)
        assert_bitwise(op.run(q, k, v, 0.3, skip_block=64), want)


def test_strides(op):
    q, k, v = problem(op, rows=3)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    got = op.run(*views, 0.3, num_splits=2)
    assert got[0].stride() == views[0].stride()
    assert_bitwise(got, op.run(q, k, v, 0.3, num_splits=2))


@pytest.mark.parametrize("two_phase", [False, True])
def test_empty(op, two_phase):
    q, k, v = problem(op)
    run = functools.partial(op.run, threshold=0.3, two_phase=two_phase)
    out, lse, counters = run(q, k[:, :, :0], v[:, :, :0])
    assert (out == 0).all() and (lse == -INF).all() and (counters == 0).all()
    for empty in (run(q[:0], k[:0], v[:0]), run(q[:, :, :0], k, v)):
        assert empty[0].numel() == empty[1].numel() == 0
        assert (empty[2][..., 0] == 0).all()


@pytest.mark.parametrize("num_splits", [None, 1, 7])
def test_two_phases_do_not_depend_on_order(op, num_splits):
    """Neither the splits nor the places of whole tiles."""
    q, k, v = problem(op, length=1536)
    run = functools.partial(op.run, threshold=0.05, two_phase=True, causal=False)
    want = run(q, k, v)
    assert 0 < want[2][..., 0].sum() < want[2][..., 1].sum()
    got = run(q, k, v, num_splits=num_splits)
    assert_bitwise(got[2], want[2], "counters")
    assert_close(got[:2], want[:2])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    moved = [x.unflatten(2, (12, 128))[:, :, order].flatten(2, 3) for x in (k, v)]
    got = run(q, *moved, num_splits=num_splits)
    assert_bitwise(got[2], want[2], "counters of moved tiles")
    assert_close(got[:2], want[:2])


@pytest.mark.parametrize("threshold", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("rows", [1, 2])
def test_two_phases_skip_no_less(op, rows, threshold):
    q, k, v = problem(op, rows=rows)
    *_, two = op.run(q, k, v, threshold, two_phase=True)
    for num_splits in (1, 3):
        *_, one = op.run(q, k, v, threshold, num_splits=num_splits)
        assert (two[..., 0] >= one[..., 0]).all() and 0 < one[..., 0].sum()


@pytest.mark.parametrize("two_phase", [False, True])
@pytest.mark.usefixtures("cuda_backend")
def test_graph_replay_with_new_lambdas_and_lengths(two_phase):
    (q, k, v), options, _ = decode_case(dict(cache=16, dtype=torch.bfloat16))
    q, k, v = (x.cuda() for x in (q, k, v))
    options = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    lens, table = options["seq_lens"], torch.full((2, 8), 0.3, device="cuda")
    run = functools.partial(
        attnsieve.threshold_attention, num_splits=2, two_phase=two_phase, **options, **BOTH
    )
    graph, result = capture(run, q, k, v, table)
    skipped = set()
    for value, length in ((0.3, 1500), (0.0, 1500), (4.0, 1100), (0.05, 0)):
        table.fill_(value)
        lens[0] = length
        graph.replay()
        torch.cuda.synchronize()
        assert_bitwise(result, run(q, k, v, table), f"replay at {value}, {length}")
        skipped.add(int(result[2][..., 0].sum()))
    assert len(skipped) > 2, "the replays decided alike"
