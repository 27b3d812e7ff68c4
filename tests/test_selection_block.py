"""Selected blocks are exactly what the rule says, ties, NaN and forced sets included."""

import math

import pytest
import torch

import attnsieve
from attnsieve import reference
from cases import BLOCKS, DTYPES, pairwise, randn
from numerics import assert_bitwise

SHAPES = ((1, 1), (64, 64), (65, 129), (200, 700), (700, 200), (513, 513), (130, 1))
MASKS = ((False, None), (True, None), (False, (100, 70)), (True, (64, 0)), (False, (0, 0)))
RULES = (
    dict(topk=1),
    dict(topk=3),
    dict(topk=1000),
    dict(fraction=0.25),
    dict(fraction=0.5, min_blocks=2),
    dict(fraction=1.0),
)
FORCED = (
    dict(sink_blocks=0, local_blocks=0, diagonal=False),
    dict(sink_blocks=1, local_blocks=0, diagonal=True),
    dict(sink_blocks=2, local_blocks=3, diagonal=True),
    dict(sink_blocks=0, local_blocks=2, diagonal=False),
)
CASES = pairwise(shape=SHAPES, mask=MASKS, rule=RULES, forced=FORCED, block=BLOCKS, values=range(4))


def block_scores(shape, kind, device):
    """0 normal, 1 a coarse grid full of ties, 2 all equal, 3 NaN, infinities and both zeros."""
    scores = randn(shape, seed=kind)
    if kind == 1:
        scores = scores.round()
    elif kind == 2:
        scores = torch.full_like(scores, 0.5)
    elif kind == 3:
        special = torch.tensor([math.nan, -math.inf, math.inf, 0.0, -0.0, 3e38, -3e38, 1e-45])
        generator = torch.Generator().manual_seed(9)
        chosen = torch.randint(0, 2 * len(special), shape, generator=generator)
        scores = torch.where(chosen < len(special), special[chosen % len(special)], scores)
    return scores.to(device)


def options_of(pick):
    causal, window = pick["mask"]
    block_q, block_k = pick["block"]
    masks = dict(causal=causal, window=window, block_q=block_q, block_k=block_k)
    return masks | pick["rule"] | pick["forced"]


def scores_shape(shape, block, batch=2, num_heads=3):
    return batch, num_heads, -(-shape[0] // block[0]), -(-shape[1] // block[1])


def assert_same_index(actual, expected, what=""):
    """Equal counts, equal ids up to them, -1 behind."""
    assert_bitwise(actual.counts, expected.counts, f"counts {what}")
    width = min(actual.capacity, expected.capacity)
    assert (expected.counts <= actual.capacity).all(), what
    assert_bitwise(actual.columns[..., :width], expected.columns[..., :width], f"columns {what}")
    assert (actual.columns[..., width:] == -1).all(), what


@pytest.mark.parametrize("pick", CASES, ids=[str(i) for i in range(len(CASES))])
def test_rules_match_the_definition(device, pick):
    shape = scores_shape(pick["shape"], pick["block"])
    scores = block_scores(shape, pick["values"], device)
    options = options_of(pick)
    index = attnsieve.select_from_scores(scores, *pick["shape"], **options)
    assert_same_index(index, reference.select_from_scores(scores, *pick["shape"], **options), pick)
    index.validate(shape[-1])


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("columns", [1, 255, 256, 257, 512, 1000, 1025, 2048, 2049])
def test_rows_of_any_width(device, columns, kind):
    """Kernels keep the scores of a row in registers up to a width of their own."""
    scores = block_scores((1, 2, 5, columns), kind, device)
    for rule in (dict(topk=1), dict(topk=columns // 3 + 1), dict(fraction=0.9)):
        for forced in (FORCED[0], FORCED[2]):
            options = dict(causal=True, window=(columns * 48, 0), **rule, **forced)
            index = attnsieve.select_from_scores(scores, 300, columns * 64, **options)
            want = reference.select_from_scores(scores, 300, columns * 64, **options)
            assert_same_index(index, want, (rule, forced))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [0, 1])
def test_topk_keeps_the_largest_scores(device, kind, causal):
    """Score multisets equal torch.topk's exactly; no tolerance, no overlap ratio."""
    scores = block_scores((1, 2, 20, 40), kind, device)
    bare = dict(sink_blocks=0, diagonal=False, causal=causal)
    index = attnsieve.select_from_scores(scores, 20 * 64, 40 * 64, topk=7, **bare)
    visible = torch.arange(40, device=device) <= torch.arange(20, device=device)[:, None] + 20
    masked = scores.masked_fill(~visible, -torch.inf) if causal else scores
    assert (index.counts == 7).all()
    kept = masked.gather(-1, index.columns[..., :7].long()).sort(-1, descending=True).values
    assert_bitwise(kept, masked.topk(7).values, "multiset of kept scores")


def test_ties_go_to_the_smaller_index(device):
    scores = torch.zeros(1, 1, 1, 300, device=device)
    scores[..., 1::2] = -0.0  # equal to 0.0
    index = attnsieve.select_from_scores(
        scores, 64, 300 * 64, topk=9, sink_blocks=0, diagonal=False
    )
    assert index.columns[0, 0, 0, :9].tolist() == list(range(9))


def test_nan_ranks_below_minus_infinity(device):
    scores = torch.full((1, 1, 1, 6), -math.inf, device=device)
    scores[..., [0, 2]] = math.nan
    bare = dict(sink_blocks=0, diagonal=False)
    index = attnsieve.select_from_scores(scores, 64, 6 * 64, topk=4, **bare)
    assert index.columns[0, 0, 0, :4].tolist() == [1, 3, 4, 5]
    index = attnsieve.select_from_scores(scores, 64, 6 * 64, topk=5, **bare)
    assert index.columns[0, 0, 0, :5].tolist() == [0, 1, 3, 4, 5]


def test_budget_above_the_visible_blocks_keeps_them_all(device):
    scores = randn((1, 1, 4, 4), device=device)
    index = attnsieve.select_from_scores(scores, 256, 256, topk=4, causal=True)
    assert index.counts[0, 0].tolist() == [1, 2, 3, 4]
    assert index.columns[0, 0, 1].tolist() == [0, 1, -1, -1]


def test_forced_blocks_are_inside_the_budget(device):
    scores = torch.arange(16.0, device=device).expand(1, 1, 16, 16).contiguous()
    forced = dict(sink_blocks=1, local_blocks=1, diagonal=True)
    index = attnsieve.select_from_scores(scores, 1024, 1024, topk=4, **forced)
    assert index.columns[0, 0, 8, :4].tolist() == [0, 7, 8, 15]
    index = attnsieve.select_from_scores(scores, 1024, 1024, topk=2, **forced)
    assert index.columns[0, 0, 8, :3].tolist() == [0, 7, 8], "forced blocks stay above the budget"


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("causal", [False, True])
def test_top_p_reaches_its_mass_with_the_fewest_blocks(device, causal, top_p):
    scores = 3 * randn((2, 2, 9, 30), device=device, seed=3)
    scores[0, 0, :, 5] = math.nan
    options = dict(top_p=top_p, causal=causal, min_blocks=2)
    seqlens = 9 * 64 - 13, 30 * 64 - 40
    index = attnsieve.select_from_scores(scores, *seqlens, **options)
    # float32 sums may fall on either side of a mass this close to top_p.
    counts = [
        reference.select_from_scores(scores, *seqlens, **(options | dict(top_p=p))).counts
        for p in (top_p - 1e-5, top_p + 1e-5)
    ]
    clear = counts[0] == counts[1]
    assert clear.float().mean() > 0.9
    expected = reference.select_from_scores(scores, *seqlens, **options)
    assert_bitwise(index.counts[clear], expected.counts[clear], "counts")
    width = min(index.capacity, expected.capacity)
    same = index.columns[..., :width] == expected.columns[..., :width]
    assert same[clear].all()


def test_top_p_counts_forced_mass(device):
    """Forced blocks come first in the running mass, so a heavy one leaves room for nothing else."""
    scores = torch.zeros(1, 1, 1, 8, device=device)
    scores[..., 0] = 20.0
    index = attnsieve.select_from_scores(
        scores, 64, 512, top_p=0.9, sink_blocks=1, diagonal=False, min_blocks=1
    )
    assert index.columns[0, 0, 0, :1].tolist() == [0] and int(index.counts) == 1


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("seqlens", [(64, 64), (130, 333), (257, 100)], ids=str)
def test_pooled_scores(device, seqlens, block):
    for dtype in DTYPES[device]:
        q = randn((2, 4, seqlens[0], 64), dtype, device, seed=1)
        k = randn((2, 2, seqlens[1], 64), dtype, device, seed=2)
        options = dict(block_q=block[0], block_k=block[1])
        scores = attnsieve.pooled_block_scores(q, k, **options)
        expected = reference.pooled_block_scores(q, k, **options)
        assert scores.dtype == torch.float32
        assert scores.shape == scores_shape(seqlens, block, 2, 4)
        # Means of exact inputs in float32: no rounding to the inputs' own type on the way.
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_select_blocks_is_pooled_scores_then_rule(device, rule):
    dtype = DTYPES[device][0]
    q = randn((1, 4, 300, 64), dtype, device, seed=4)
    k = randn((1, 2, 700, 64), dtype, device, seed=5)
    index = attnsieve.select_blocks(q, k, causal=True, **rule)
    scores = attnsieve.pooled_block_scores(q, k)
    expected = reference.select_from_scores(scores, 300, 700, causal=True, **rule)
    assert_same_index(index, expected, rule)


def test_long_rows_with_equal_exponents(device):
    """Many scores that differ only in low mantissa bits, in a row longer than any shared buffer."""
    num_k_blocks = 20_000
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(num_k_blocks, generator=generator).float()
    scores = (1.0 + order * 2.0**-23).to(device)[None, None, None]
    bare = dict(sink_blocks=0, diagonal=False)
    index = attnsieve.select_from_scores(scores, 64, num_k_blocks * 64, topk=2048, **bare)
    kept = scores[0, 0, 0].topk(2048).indices.sort().values
    assert_bitwise(index.columns[0, 0, 0, :2048].long(), kept, "ids")
