"""Token selection where a sample of the scores misleads, or what it lists does not fit or align."""

import pytest
import torch

import attnsieve
from cases import randn
from numerics import assert_bitwise
from token_lists import INF, NAN, OnDevice, by_stable_sort, lists_of

COLUMNS = (20_000, 100_003)  # one CTA, a cluster
KEYS = 8192  # what a list of candidates holds
SAMPLED_K = 6144  # the largest budget that is sampled for


@pytest.fixture
def op(device):
    return OnDevice(attnsieve, device)


def check(op, scores, *budgets):
    for k in budgets:
        assert_bitwise(op.select_topk(scores, k).indices, by_stable_sort(scores, k), f"k {k}")


@pytest.mark.parametrize("columns", COLUMNS)
def test_the_best_lie_together(op, columns):
    """A run of better scores at the begin, in the middle and at the end; and a long slope."""
    scores = randn((4, 1, columns), seed=1)
    for row, begin in enumerate((0, columns // 2, columns - 3000)):
        scores[row, 0, begin : begin + 3000] += 9.0
    scores[3, 0] = torch.arange(columns) / 7.0
    check(op, scores, 1, 64, 2048, 3000, 3001, 4096)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("period", [4, 64, 256])
def test_scores_of_a_period(op, columns, period):
    """What a sample in equal strides would see too much of, or nothing."""
    best = torch.arange(columns) % period == 3
    scores = torch.where(best, 2.0, 0.0) + 0.5 * randn((1, 1, columns), seed=period)
    check(op, scores, 16, 300, 2048)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("better", [0, 1, 2047, 2048, 2049, KEYS - 1, KEYS, KEYS + 1])
def test_equal_scores_fill_the_budget(op, columns, better):
    """``better`` scores above one that most others equal; the rest are below it, -inf or NaN."""
    generator = torch.Generator().manual_seed(better)
    order = torch.randperm(columns, generator=generator)
    scores = torch.full((2, 1, columns), -2.5)
    scores[0, 0, order[:better]] = randn((better,), seed=2).abs() if better else torch.empty(0)
    scores[1] = scores[0]
    for value, first in ((-9.0, 3000), (-INF, 4000), (NAN, 5000)):
        scores[1, 0, order[-first : 1000 - first]] = value
    check(op, scores, 1, 2048, 4096, SAMPLED_K)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("scale, offset", [(0.5, 100.0), (1e-3, -7.0), (1e-30, 0.0), (1e30, 0.0)])
def test_scores_far_from_zero_and_close_to_each_other(op, columns, scale, offset):
    scores = randn((2, 1, columns), seed=3) * scale + offset
    check(op, scores, 100, 2048, SAMPLED_K, SAMPLED_K + 1)


@pytest.mark.parametrize("k", [KEYS - 1, KEYS, KEYS + 1, 15_000])
def test_budgets_around_the_list(op, k):
    scores = randn((1, 2, 40_000), seed=4)
    scores[0, 1] = scores[0, 1].round()
    check(op, scores, k)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("passing", [0, 1, KEYS - 1, KEYS, KEYS + 1, 15_000])
def test_thresholds_that_many_pass(op, columns, passing):
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(passing))
    scores = -randn((1, 1, columns), seed=5).abs()
    scores[0, 0, order[:passing]] *= -1.0
    above = torch.nonzero(scores[0, 0] > 0).flatten()
    for capacity in (100, KEYS, 16_000):
        index, passed = op.select_threshold(scores, 0.0, capacity)
        best = by_stable_sort(scores[0, 0, above], min(capacity, len(above)))
        assert lists_of(index) == [above[best.long()].tolist()]
        assert passed.item() == len(above)


@pytest.mark.parametrize("first", [0, 1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 33, 5001, 40_002])
def test_lists_that_begin_anywhere(op, first, length):
    """Views whose rows are aligned to nothing; forced ranges move the rest further."""
    k = max(1, length // 3)
    base = randn((2, 3, length + first + 1), seed=length).round(decimals=1)
    if op.device == "cuda":
        base = base.cuda()
    scores = base[..., first : first + length]
    index = op.select_topk(scores, k)
    assert_bitwise(index.indices, by_stable_sort(scores.cpu(), k))
    sink, recent = min(first, k), min(2, k - min(first, k))
    lists = lists_of(op.select_topk(scores, k, sink=sink, recent=recent))
    middle = scores.cpu()[..., sink : length - recent].flatten(0, 1)
    for row, found in zip(middle, lists, strict=True):
        best = (by_stable_sort(row, k - sink - recent) + sink).tolist()
        assert found == [*range(sink), *best, *range(length - recent, length)]
