"""Selected tokens and pages are exactly what the rule says: multisets, ties, NaN, forced sets."""

import math

import pytest
import torch

from attnsieve import reference_decode as oracle
from cases import BAD_IDS, randn
from numerics import assert_bitwise

NAN, INF = math.nan, math.inf


def scores_of(kind, shape=(2, 3, 300), seed=0):
    """0 normal, 1 a coarse grid full of ties, 2 all equal, 3 specials, 4 all -inf, 5 all NaN."""
    scores = randn(shape, seed=seed)
    if kind == 1:
        return scores.round()
    if kind == 3:
        special = torch.tensor([NAN, -INF, INF, 0.0, -0.0, 3e38, -3e38, 1e-45, -1e-45])
        generator = torch.Generator().manual_seed(9)
        chosen = torch.randint(0, 2 * len(special), shape, generator=generator)
        return torch.where(chosen < len(special), special[chosen % len(special)], scores)
    return scores if kind == 0 else torch.full_like(scores, {2: 0.5, 4: -INF, 5: NAN}[kind])


def by_stable_sort(scores, k):
    """The rule by torch.sort alone: NaN below -inf through a second key, ties by stability."""
    keys = torch.where(scores == 0, 0.0, scores)
    order = torch.where(keys.isnan(), -INF, keys).sort(dim=-1, descending=True, stable=True).indices
    last = keys.isnan().gather(-1, order).int().sort(dim=-1, stable=True).indices
    return order.gather(-1, last)[..., :k].sort(-1).values.int()


def lists_of(index):
    """Nested lists without padding; checks that what is behind the counts is -1."""
    beyond = torch.arange(index.capacity) >= index.counts.unsqueeze(-1)
    assert (index.indices[beyond] == -1).all()
    rows = zip(index.indices.flatten(0, -2), index.counts.flatten().tolist(), strict=True)
    return [row[:count].tolist() for row, count in rows]


@pytest.mark.parametrize("k", [1, 2, 64, 255, 300])
@pytest.mark.parametrize("kind", range(6))
def test_topk_is_a_stable_sort(kind, k):
    scores = scores_of(kind)
    index = oracle.select_topk(scores, k)
    assert_bitwise(index.indices, by_stable_sort(scores, k))
    assert (index.counts == k).all()
    index.validate(300)


@pytest.mark.parametrize("kind", [0, 1, 2, 4])
def test_score_multisets_equal_torch_topk(kind):
    scores = scores_of(kind)
    index = oracle.select_topk(scores, 77)
    kept = scores.gather(-1, index.indices.long()).sort(-1, descending=True).values
    assert_bitwise(kept, scores.topk(77, -1).values)


@pytest.mark.parametrize("kind", [0, 3, 4, 5])
def test_fewer_candidates_than_k(kind):
    lens = torch.tensor([0, 40], dtype=torch.int32)
    index = oracle.select_topk(scores_of(kind), 64, seq_lens=lens)
    assert lists_of(index) == [[]] * 3 + [list(range(40))] * 3
    beyond = torch.tensor([-5, 2**31 - 1], dtype=torch.int32)
    index = oracle.select_topk(scores_of(kind), 500, seq_lens=beyond)
    assert lists_of(index) == [[]] * 3 + [list(range(300))] * 3
    assert index.indices.shape == (2, 3, 500)


def test_scores_beyond_the_length_never_matter():
    scores = scores_of(1)
    lens = torch.tensor([0, 123], dtype=torch.int32)
    expected = oracle.select_topk(scores, 20, seq_lens=lens)
    for poison in (NAN, INF, -INF):
        scores[0], scores[1, :, 123:] = poison, poison
        assert_bitwise(oracle.select_topk(scores, 20, seq_lens=lens).indices, expected.indices)


@pytest.mark.parametrize("sink, recent", [(1, 0), (0, 4), (3, 5), (4, 6)])
@pytest.mark.parametrize("kind", [0, 1, 3, 5])
def test_forced_ranges_are_inside_the_budget(kind, sink, recent):
    scores = scores_of(kind)
    lens = torch.tensor([7, 200], dtype=torch.int32)
    index = oracle.select_topk(scores, 10, seq_lens=lens, sink=sink, recent=recent)
    lists = lists_of(index)
    assert lists[:3] == [list(range(7))] * 3
    raised = scores[1, :, :200].clone()
    middle = by_stable_sort(raised[:, sink : 200 - recent], 10 - sink - recent) + sink
    ends = [*range(sink)], [*range(200 - recent, 200)]
    assert lists[3:] == [ends[0] + row.tolist() + ends[1] for row in middle]


def test_forced_beyond_the_budget_is_refused():
    for sink, recent in ((5, 6), (-1, 0), (0, -1), (11, 0)):
        with pytest.raises(ValueError, match="sink"):
            oracle.select_topk(scores_of(0), 10, sink=sink, recent=recent)


@pytest.mark.parametrize("page_size", [1, 16])
def test_rows_see_their_own_prefix(page_size):
    scores = scores_of(0, (2, 4, 3, 20))
    lens = torch.tensor([3, 20 * page_size], dtype=torch.int32)
    options = dict(page_size=page_size, recent=1)
    index = oracle.select_topk(scores, 5, seq_lens=lens, causal=True, **options)
    for row in range(4):
        own = oracle.select_topk(scores[:, row], 5, seq_lens=lens - 3 + row, **options)
        assert_bitwise(index.indices[:, row], own.indices)
        assert_bitwise(index.counts[:, row], own.counts)
    whole = oracle.select_topk(scores, 5, seq_lens=lens, **options)
    assert_bitwise(whole.indices[:, 3], index.indices[:, 3])


def test_slots_come_from_the_page_table():
    scores = scores_of(0, (2, 3, 64))
    table = torch.randperm(16, generator=torch.Generator().manual_seed(2)).int().view(2, 8)
    table[0, 1:6] = torch.tensor(BAD_IDS)
    plain = oracle.select_topk(scores, 20, sink=2)
    where = dict(block_table=table, table_page_size=8, num_pages=16)
    slots = oracle.select_topk(scores, 20, sink=2, **where)
    assert slots.physical and torch.equal(slots.counts, plain.counts)
    for b in range(2):
        j = plain.indices[b].long()
        page = table[b].long()[j // 8]
        expected = torch.where((page >= 0) & (page < 16), page * 8 + j % 8, -1)
        assert_bitwise(slots.indices[b], expected.int())
    pages = oracle.select_topk(scores[..., :8], 8, page_size=8, **where)
    assert_bitwise(pages.indices[1], table[1].expand(3, 8))
    with pytest.raises(ValueError, match="page_size"):
        oracle.select_topk(scores, 20, page_size=4, **where)


@pytest.mark.parametrize("kind", range(6))
@pytest.mark.parametrize("threshold", [-INF, -0.5, 0.0, 0.5, INF, NAN])
def test_threshold_keeps_what_is_above(kind, threshold):
    scores = scores_of(kind)
    index, passed = oracle.select_threshold(scores, threshold, 300)
    expected = [torch.nonzero(row > threshold).flatten().tolist() for row in scores.flatten(0, 1)]
    assert lists_of(index) == expected
    assert_bitwise(passed, index.counts)


@pytest.mark.parametrize("kind", [0, 1, 3])
def test_threshold_overflow_keeps_the_best(kind):
    scores = scores_of(kind)
    index, passed = oracle.select_threshold(scores, -3.0, 50, sink=2, recent=3)
    assert_bitwise(index.indices, oracle.select_topk(scores, 50, sink=2, recent=3).indices)
    forced = torch.zeros(300, dtype=torch.bool)
    forced[:2], forced[-3:] = True, True
    assert_bitwise(passed, ((scores > -3.0) | forced).sum(-1).int())


def test_threshold_per_head():
    scores = scores_of(1)
    limits = torch.tensor([[0.0, 1.0, INF], [-1.0, NAN, 2.0]])
    index, _ = oracle.select_threshold(scores, limits, 300, recent=1)
    for b in range(2):
        for h in range(3):
            own, _ = oracle.select_threshold(
                scores[b : b + 1, h : h + 1], limits[b, h], 300, recent=1
            )
            assert_bitwise(index.indices[b, h], own.indices[0, 0])
    by_batch, _ = oracle.select_threshold(scores, limits[:, 0], 300)
    assert_bitwise(by_batch.indices[1], oracle.select_threshold(scores, -1.0, 300)[0].indices[1])


@pytest.mark.parametrize("shape", [(0, 2, 8), (2, 0, 8), (2, 2, 0), (2, 0, 3, 8)])
def test_empty(shape):
    index = oracle.select_topk(torch.zeros(shape), 4)
    assert index.indices.shape == (*shape[:-1], 4)
    assert (index.indices == -1).all() or shape[-1] > 0
    none = oracle.select_topk(torch.zeros(2, 2, 8), 0)
    assert none.indices.shape == (2, 2, 0) and (none.counts == 0).all()
