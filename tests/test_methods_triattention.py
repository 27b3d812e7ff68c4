"""TriAttention attends to what queries ahead will want; the rules are in ``decode_rules.py``."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnsieve import CachedKV
from attnsieve.methods import DenseDecode, TriAttention, query_centres
from attnsieve.methods.triattention import effective_queries
from attnsieve.rotary import from_pairs, rotation, to_pairs
from cases import randn
from decode_rules import triattention, triattention_scores, unturned
from numerics import assert_bitwise
from test_methods_decode import FIRST, HEADS, LAYERS, TOLERANCE, Steps, check

LAYOUTS = pytest.mark.parametrize("interleaved", [False, True])
BUDGET = dict(k=30, period=3, recent=5, keep_prompt=False)
# Angles per position as of base 10000, float32 numbers as models have them.
FREQUENCIES = (10000.0 ** -(torch.arange(32) / 32)).double()


def turned(x, interleaved=False):
    """RoPE at the positions 0, 1 ... of dim -2."""
    pairs = torch.view_as_complex(to_pairs(x.double(), interleaved).contiguous())
    turns = rotation(torch.arange(x.shape[-2], device=x.device), FREQUENCIES.to(x.device))
    return from_pairs(torch.view_as_real(pairs * turns), interleaved).to(x.dtype)


def rope_steps(heads, device="cpu", dtype=torch.float32, interleaved=False):
    """Keys and queries that lie around centres of their own before RoPE."""
    steps = Steps(heads, device, dtype)
    centres = 2 * randn((LAYERS, 2, heads[1], 1, 64), dtype, device, 6)
    steps.k = turned(steps.k + centres, interleaved)
    return steps


def prompt_of(steps, interleaved=False):
    shape = (LAYERS, 2, steps.heads[0], FIRST, 64)
    centres = randn((*shape[:3], 1, 64), steps.k.dtype, steps.k.device, 8)
    return turned(randn(shape, steps.k.dtype, steps.k.device, 4) + centres, interleaved)


def prefilled(steps, **options):
    method = TriAttention(FREQUENCIES.float(), **BUDGET | options)
    prompt = prompt_of(steps, method.interleaved)
    for layer in range(LAYERS):
        method.prefill(prompt[layer], steps.k[layer, :, :, :FIRST], layer_idx=layer)
    return method


@LAYOUTS
@pytest.mark.parametrize("mean", [True, False])
@given(seed=st.integers(0, 99), at=st.integers(0, 100_000), length=st.integers(1, 30))
def test_effective_queries_are_the_trigonometric_form(interleaved, mean, seed, at, length):
    """The sum of cosines of distances, and one product: in float64 the same numbers."""
    q, k = (randn((2, length, 64), torch.float64, seed=seed + n) for n in (0, 100))
    rope = dict(interleaved=interleaved)
    aggregate = "mean" if mean else "max"
    want = triattention_scores(q, k, at, FREQUENCIES, aggregate, **rope)
    centres = query_centres(q.unsqueeze(0), FREQUENCIES, **rope)
    ahead = effective_queries(centres, FREQUENCIES, torch.tensor([at]), mean=mean, **rope)
    products = (ahead[0] @ k.mT).amax(1)
    norms = to_pairs(k, interleaved).norm(dim=-1)
    spread = (norms * (centres.norm - centres.mean.abs())[0].unsqueeze(1)).sum(-1)
    torch.testing.assert_close(products + spread, want, rtol=1e-9, atol=1e-9)


@LAYOUTS
@pytest.mark.parametrize("begin", [0, 37])
def test_centres_are_those_before_rope(interleaved, begin, monkeypatch):
    monkeypatch.setattr("attnsieve.methods.triattention._CHUNK", 7)
    q = randn((2, 3, 20, 64), seed=1)
    positions = begin + torch.arange(20, dtype=torch.float64)
    want = unturned(q.double(), positions, FREQUENCIES, interleaved)
    got = query_centres(q, FREQUENCIES.float(), begin=begin, interleaved=interleaved)
    torch.testing.assert_close(got.mean.to(want.dtype), want.mean(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.norm.double(), want.abs().mean(2), rtol=1e-5, atol=1e-6)


def rule_of(steps, method, *, first=0, lists=None, period=3):
    """Selected at every third step among the keys before it; newer ones besides."""
    prompt, chosen = prompt_of(steps, method.interleaved), {}
    lists = steps.heads[1] if lists is None else lists

    def rule(step, layer, b):
        at = FIRST - 1 + step // period * period
        _, k, _ = steps.of(step, layer, b)
        if (at, layer, b) not in chosen:
            q, rope = prompt[layer, b].double(), (FREQUENCIES, method.aggregate, method.interleaved)
            scores = triattention_scores(q, k[:, :at], at, *rope)
            options = (lists, method.k, first, method.recent, method.normalize)
            chosen[at, layer, b] = triattention(scores, *options)
        return [kept | {*range(at, k.shape[1])} for kept in chosen[at, layer, b]]

    return rule


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("aggregate", ["mean", "max"])
@pytest.mark.parametrize("normalize", [True, False])
def test_triattention(heads, aggregate, normalize):
    steps = rope_steps(heads)
    method = prefilled(steps, aggregate=aggregate, normalize=normalize)
    check(steps, method, rule_of(steps, method))


@LAYOUTS
@pytest.mark.parametrize("list_heads", ["q", "kv", "one"])
def test_lists_of_heads_and_layouts(list_heads, interleaved):
    steps = rope_steps((6, 3), interleaved=interleaved)
    method = prefilled(steps, list_heads=list_heads, interleaved=interleaved)
    check(steps, method, rule_of(steps, method, lists=dict(q=6, kv=3, one=1)[list_heads]))


def test_prompts_are_kept_and_periods_may_be_steps():
    steps = rope_steps((6, 3))
    method = prefilled(steps, keep_prompt=True, k=30 + FIRST // 3, period=0)
    with pytest.raises(ValueError, match="^k: .*150 tokens.*keep_prompt"):
        steps.run(method)
    method.prompts = {place: FIRST // 3 for place in method.prompts}
    check(steps, method, rule_of(steps, method, first=FIRST // 3, period=1))


def test_without_centres_or_within_the_budget_is_dense():
    steps = rope_steps((6, 3))
    dense = steps.run(DenseDecode())
    assert_bitwise(steps.run(TriAttention(FREQUENCIES)), dense)
    everything = steps.run(prefilled(steps, k=200))
    torch.testing.assert_close(everything, dense, **TOLERANCE["cpu"])


@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_in_pages_again_and_of_one_sequence(device, aggregate):
    steps = rope_steps((6, 3), device, torch.float32 if device == "cpu" else torch.bfloat16)
    method = prefilled(steps, aggregate=aggregate)
    plain = steps.run(method)
    assert len(method.state) == 2 * LAYERS
    method.reset()
    assert not method.state
    pages = steps.run(method, steps.paged(torch.nan))
    torch.testing.assert_close(pages, plain, **TOLERANCE[device])
    assert_bitwise(steps.run(prefilled(steps, aggregate=aggregate)), plain)
    one = Steps((6, 3), device, steps.k.dtype)
    one.q, one.k, one.v = steps.q[:, :, 1:], steps.k[:, 1:], steps.v[:, 1:]
    method = TriAttention(FREQUENCIES, **BUDGET, aggregate=aggregate)
    for layer in range(LAYERS):
        method.prefill(prompt_of(steps)[layer][1:], one.k[layer, :, :, :FIRST], layer_idx=layer)
    torch.testing.assert_close(one.run(method), plain[:, :, 1:], **TOLERANCE[device])


def test_a_calibration_is_what_a_prefill_of_its_text_finds():
    steps = rope_steps((6, 3))
    learned = prefilled(steps)
    one = [query_centres(prompt_of(steps)[x, :1], FREQUENCIES) for x in range(LAYERS)]
    method = TriAttention(FREQUENCIES, **BUDGET, calibration=one)
    for place, centres in learned.centres.items():
        learned.centres[place] = type(centres)(centres.mean[:1], centres.norm[:1])
    got = steps.run(method)
    torch.testing.assert_close(got, steps.run(learned), **TOLERANCE["cpu"])
    method.prefill(prompt_of(steps)[0], steps.k[0, :, :, :FIRST])
    assert method.centres[0, 0].mean.shape[0] == 1


def test_a_later_piece_keeps_what_the_first_taught():
    """Its keys are new all the same: what is beside the cache is made again."""
    steps, piece = rope_steps((6, 3)), slice(FIRST - 9, FIRST)
    method = prefilled(steps)
    learned = dict(method.centres)
    for layer in range(LAYERS):
        cache = CachedKV(*(x[layer, :, :, : FIRST - 9] for x in (steps.k, steps.v)))
        method(steps.q[0, layer], cache, layer_idx=layer)
        q, k = randn((2, 6, 9, 64)), steps.k[layer][:, :, piece]
        method.prefill(q, k, layer_idx=layer, begin=FIRST - 9)
    assert all(method.centres[place] is kept for place, kept in learned.items())
    assert_bitwise(steps.run(method), steps.run(prefilled(steps)))


def test_tokens_in_the_place_of_rejected_ones_are_seen():
    """Values are unit vectors. Lists are chosen at 39 of 40 tokens; every later one is seen."""
    k, v = randn((1, 1, 60, 64)), torch.eye(60, 64).view(1, 1, 60, 64)
    method = TriAttention(FREQUENCIES, k=6, recent=2, period=99, keep_prompt=False)
    method.prefill(randn((1, 2, 39, 64)), k[:, :, :39])
    newer = set()
    for length, rows in ((40, 1), (36, 1), (37, 1), (34, 3), (35, 1), (43, 8)):
        begin = length - rows
        k[:, :, begin:length] = randn((1, 1, rows, 64), seed=length)
        q = randn((1, 2, rows, 64), seed=rows)
        weights = method(q, CachedKV(k[:, :, :length], v[:, :, :length]))[0, :, -1, :length]
        newer = {j for j in newer if j < begin} | {*range(begin, length)}
        assert all((weights[:, j] > 0).all() for j in newer)
        assert (weights > 0).sum() <= 2 * (6 + length - min(newer))
        scores = q[0, :, -1].double() @ k[0, 0, :length].double().T / 8
        want = torch.softmax(scores.masked_fill(weights == 0, -torch.inf), -1)
        torch.testing.assert_close(weights.double(), want, rtol=1e-4, atol=1e-7)


def test_numbers_beside_the_cache_follow_keys_that_came_between_selections():
    """A later selection is that of a method that has seen nothing before."""
    steps, outs = rope_steps((6, 3)), []
    k = steps.k[0].clone()
    for fresh in (False, True):
        method = prefilled(steps, period=22, recent=0)
        for length, rows in ((141, 1), (149, 8), (146, 5), (154, 8), (155, 1)):
            size = torch.rand(rows, 1, generator=torch.Generator().manual_seed(length)) * 4
            k[:, :, length - rows : length] = size * randn((2, 3, rows, 64), seed=length)
            if fresh:
                method.reset()
            cache = CachedKV(k[:, :, :length], steps.v[0][:, :, :length])
            out = method(randn((2, 6, rows, 64), seed=rows), cache)
        outs.append(out)
        assert method.state["lists", 0, 0][1] == 1  # selected at the last step
    assert_bitwise(*outs)


def test_rows_of_a_draft_do_not_see_later_ones():
    steps, outs = rope_steps((6, 3)), []
    q = randn((2, 6, 4, 64), seed=5)
    for poison in (0.0, 3.0):
        method, k = prefilled(steps), steps.k[0].clone()
        k[:, :, -1] += poison
        outs.append(method(q, CachedKV(k, steps.v[0]))[:, :, :3])
    assert_bitwise(*outs)


def test_bad_parameters_are_named():
    q, k = randn((1, 4, 1, 64)), randn((1, 2, 40, 64))
    for name, bad in (
        ("aggregate", dict(aggregate="sum")),
        ("period", dict(period=-1)),
        ("recent", dict(recent=31, k=30)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            TriAttention(FREQUENCIES, **bad)
    with pytest.raises(ValueError, match="^inv_freq: "):
        TriAttention(FREQUENCIES[:16]).prefill(q, k)
    calibration = [query_centres(q[:, :2], FREQUENCIES)]
    for layer, name in ((0, "calibration"), (1, "layer_idx")):
        with pytest.raises(ValueError, match=f"^{name}: "):
            TriAttention(FREQUENCIES, calibration=calibration)(q, CachedKV(k, k), layer_idx=layer)
