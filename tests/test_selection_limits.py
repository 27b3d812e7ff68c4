"""Token selection where kernels change their ways: long lists, full buffers, uneven launches."""

import pytest
import torch

import attnsieve
from cases import BAD_IDS, capture, randn
from numerics import assert_bitwise
from token_lists import INF, NAN, OnDevice, by_stable_sort, lists_of, scores_of

# Threads of a CTA times 32, the columns from which several CTAs share a list, and what one of them
# takes at most.
LIMITS = (32, 4096, 8192, 16384, 32768, 49152, 65536, 81920)
AROUND = sorted(limit + step for limit in LIMITS for step in (-1, 0, 1))
LONG = 70_001  # shared by several CTAs


@pytest.fixture
def op(device):
    return OnDevice(attnsieve, device)


def from_bits(bits):
    return bits.to(torch.int32).view(torch.float32)


def one_bucket(count, low_bits, columns=LONG, seed=0):
    """``count`` scores that differ in their last ``low_bits`` bits only; the others are below."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(columns, generator=generator)
    scores = -randn((columns,), seed=seed).abs()
    close = torch.randint(0, 1 << low_bits, (count,), generator=generator)
    scores[order[:count]] = from_bits(0x3F800000 + close)
    return scores[None, None]


@pytest.mark.parametrize("columns", AROUND)
def test_columns_around_every_limit(op, columns):
    for kind in (0, 1, 3):
        scores = scores_of(kind, (1, 2, columns), seed=columns)
        for k in {1, min(2048, columns), columns // 2 + 1, columns - 1, columns}:
            index = op.select_topk(scores, k)
            assert_bitwise(index.indices, by_stable_sort(scores, k), f"kind {kind}, k {k}")
            assert (index.counts == k).all()


@pytest.mark.parametrize("kind", [2, 4, 5])
@pytest.mark.parametrize("columns", [5000, LONG])
def test_nothing_to_choose_by(op, columns, kind):
    """All equal, all -inf, all NaN: the first k, and the forced ones."""
    scores = scores_of(kind, (1, 2, columns))
    index = op.select_topk(scores, 4096)
    assert_bitwise(index.indices, torch.arange(4096).int().expand(1, 2, 4096))
    index = op.select_topk(scores, 100, sink=3, recent=40)
    expected = torch.cat([torch.arange(60), torch.arange(columns - 40, columns)])
    assert_bitwise(index.indices, expected.int().expand(1, 2, 100))


@pytest.mark.parametrize("columns", [5000, LONG])
def test_more_room_than_candidates(op, columns):
    scores = scores_of(3, (1, 2, columns))
    index = op.select_topk(scores, columns + 77, sink=1, recent=1)
    assert lists_of(index) == [list(range(columns))] * 2
    index, passed = op.select_threshold(scores, -INF, columns + 77)
    expected = [torch.nonzero(row > -INF).flatten().tolist() for row in scores[0]]
    assert lists_of(index) == expected
    assert passed.flatten().tolist() == [len(row) for row in expected]


def test_signs_of_zero_and_specials_around_the_cut(op):
    """The cut falls on every special value in turn."""
    values = torch.tensor([INF, 3e38, 1e-45, 0.0, -0.0, -1e-45, -3e38, -INF, NAN])
    for columns in (3000, LONG):
        generator = torch.Generator().manual_seed(columns)
        scores = values[torch.randint(0, 9, (1, 1, columns), generator=generator)]
        for step in range(1, 18):
            k = step * columns // 18
            index = op.select_topk(scores, k)
            assert_bitwise(index.indices, by_stable_sort(scores, k), f"k {k} of {columns}")


@pytest.mark.parametrize("low_bits", [0, 1, 9, 10, 11, 20, 21])
@pytest.mark.parametrize("count", [4095, 4096, 4097, 20_000])
def test_buckets_around_the_size_of_a_buffer(op, count, low_bits):
    """The bin of the cut holds what a buffer holds, one more, one less, and far more."""
    for columns in (30_000, LONG):
        scores = one_bucket(count, low_bits, columns)
        for k in (1, count // 2, count - 1, count, count + 1):
            index = op.select_topk(scores, k)
            assert_bitwise(index.indices, by_stable_sort(scores, k), f"k {k} of {columns}")


@pytest.mark.parametrize("capacity", [0, 1, 1000, 5000])
def test_threshold_of_long_lists(op, capacity):
    scores = scores_of(1, (1, 2, LONG))
    for threshold in (-INF, 0.0, 2.0, INF, NAN):
        index, passed = op.select_threshold(scores, threshold, capacity)
        above = scores > threshold
        assert_bitwise(passed, above.sum(-1).int(), f"threshold {threshold}")
        best = by_stable_sort(scores, capacity)[0]
        for h, kept in enumerate(lists_of(index)):
            passing = torch.nonzero(above[0, h]).flatten()
            expected = best[h] if len(passing) > capacity else passing
            assert kept == expected.tolist(), f"threshold {threshold}"


LENGTHS = (0, 1, 31, 32, 33, 2047, 4096, 30_000, 49_153, LONG, LONG + 9, -1)


@pytest.mark.parametrize("k", [2, 2048])
@pytest.mark.parametrize("columns", [5000, LONG])
def test_lengths_that_differ_in_one_launch(op, columns, k):
    scores = scores_of(3, (len(LENGTHS), 2, columns))
    lens = torch.tensor(LENGTHS, dtype=torch.int32)
    index = op.select_topk(scores, k, seq_lens=lens, sink=1, recent=1)
    above, passed = op.select_threshold(scores, 1.0, k, seq_lens=lens, sink=1, recent=1)
    for b, length in enumerate(LENGTHS):
        own = scores[b : b + 1, :, : max(length, 0)]
        alone = op.select_topk(own, k, sink=1, recent=1)
        assert_bitwise(index.indices[b], alone.indices[0], f"length {length}")
        assert_bitwise(index.counts[b], alone.counts[0], f"length {length}")
        alone, wanted = op.select_threshold(own, 1.0, k, sink=1, recent=1)
        assert_bitwise(above.indices[b], alone.indices[0], f"length {length}")
        assert_bitwise(passed[b], wanted[0], f"length {length}")


@pytest.mark.parametrize("page_size", [1, 16])
def test_slots_and_causal_rows_of_long_lists(op, page_size):
    scores = scores_of(0, (1, 3, 2, LONG))
    lens = torch.tensor([LONG * page_size], dtype=torch.int32)
    pages = LONG if page_size > 1 else -(-LONG // 16)
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).int()[None]
    table[0, :5] = torch.tensor(BAD_IDS)
    options = dict(seq_lens=lens, page_size=page_size, causal=True, sink=90, recent=9)
    plain = op.select_topk(scores, 3000, **options)
    slots = op.select_topk(
        scores, 3000, **options, block_table=table, table_page_size=16, num_pages=pages
    )
    assert_bitwise(slots.counts, plain.counts)
    j = plain.indices.long()
    page = table[0].long()[j if page_size > 1 else j // 16]
    entry = page if page_size > 1 else page * 16 + j % 16
    assert_bitwise(slots.indices, torch.where((page >= 0) & (page < pages), entry, -1).int())
    for row in range(3):
        own = op.select_topk(
            scores[:, row], 3000, **(options | dict(causal=False, seq_lens=lens - 2 + row))
        )
        assert_bitwise(plain.indices[:, row], own.indices)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_a_million_candidates(op, kind):
    scores = scores_of(kind, (1, 1, 1 << 20))
    for k in (1, 4096, 300_000):
        assert_bitwise(op.select_topk(scores, k).indices, by_stable_sort(scores, k), f"k {k}")


def test_lists_beyond_2_to_the_31_scores_apart(op):
    """Strides that 32 bits do not hold, without the memory: every list is the same one."""
    scores = op.to_device(scores_of(1, (1, 1, 300)))
    far = scores.as_strided((1, 1, 300), (2**40, 2**35, 1))
    assert_bitwise(op.select_topk(far, 50).indices, op.select_topk(scores, 50).indices)


SHAPES = ((3, 5000), (300, 5000), (3, LONG))  # 1,000 turns of each


@pytest.mark.parametrize("lists, columns", SHAPES)
def test_repeats_are_the_same_bits(op, lists, columns):
    scores = op.to_device(scores_of(1, (1, lists, columns)))
    expected = op.select_topk(scores, 2000), op.select_threshold(scores, 2.0, 2000)
    for turn in range(5 if op.device == "cpu" else 1000):
        assert_bitwise(op.select_topk(scores, 2000).indices, expected[0].indices, f"turn {turn}")
        index, passed = op.select_threshold(scores, 2.0, 2000)
        assert_bitwise(index.indices, expected[1][0].indices, f"turn {turn}")
        assert_bitwise(passed, expected[1][1], f"turn {turn}")


@pytest.mark.slow
def test_soak_of_shared_lists(cuda_backend):
    """100,000 launches in four streams of lists that several CTAs share, ties in most of them."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    inputs = [scores_of(kind, (2 + kind, 1, LONG)).cuda() for kind in (0, 1, 2, 3)]
    expected = [attnsieve.select_topk(scores, 2048).indices for scores in inputs]
    for want, scores in zip(expected, inputs, strict=True):
        assert_bitwise(want.cpu(), by_stable_sort(scores.cpu(), 2048))
    differ = [torch.zeros((), dtype=torch.bool, device="cuda") for _ in streams]
    torch.cuda.synchronize()
    for _ in range(25_000):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got = attnsieve.select_topk(inputs[i], 2048).indices
                differ[i] |= (got != expected[i]).any()
    torch.cuda.synchronize()
    assert not any(differ)


@pytest.mark.parametrize("columns", [5000, LONG])
def test_graph_replay_with_new_scores_lengths_and_tables(cuda_backend, columns):
    scores, lens = randn((4, 2, columns), device="cuda"), torch.full((4,), columns).int().cuda()
    table = torch.zeros(4, -(-columns // 16), dtype=torch.int32, device="cuda")
    where = dict(block_table=table, table_page_size=16, num_pages=50)

    def run():
        index = attnsieve.select_topk(scores, 500, seq_lens=lens, recent=3, **where)
        above, passed = attnsieve.select_threshold(scores, 1.5, 500, seq_lens=lens, **where)
        return index.indices, index.counts, above.indices, above.counts, passed

    graph, captured = capture(run)
    lengths = (columns, 0, 499, 501), (1, columns - 1, -5, columns + 5), (4097, 31, 2000, columns)
    for turn, own in enumerate(lengths):
        lens.copy_(torch.tensor(own))
        scores.copy_(scores_of(turn, tuple(scores.shape), seed=turn))
        table.copy_(torch.randint(-3, 55, table.shape))
        for x in captured:
            x.fill_(7)
        graph.replay()
        torch.cuda.synchronize()
        assert_bitwise(captured, run(), f"replay {turn}")
        on_cpu = dict(seq_lens=lens.cpu(), recent=3, **(where | dict(block_table=table.cpu())))
        expected = attnsieve.select_topk(scores.cpu(), 500, **on_cpu)
        assert_bitwise(captured[0].cpu(), expected.indices, f"replay {turn}")
