"""Decode methods attend to what their papers say: each rule is written out in float64.

The rules are in ``decode_rules.py``; a step is one row per sequence.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnsieve import CachedKV, PagedKVCache
from attnsieve.methods import (
    DSA,
    Delta,
    DenseDecode,
    Quest,
    Recycled,
    TidalDecode,
    TokenSelect,
)
from cases import randn
from decode_rules import (
    delta,
    dsa,
    index_inputs,
    quest,
    recycled,
    tidaldecode,
    tokenselect,
)
from layouts import page_bounds
from numerics import assert_bitwise

TOLERANCE = dict(cpu=dict(rtol=1e-5, atol=1e-5), cuda=dict(rtol=2e-2, atol=2e-2))

HEADS = ((4, 4), (6, 3), (8, 2))
LAYERS, FIRST, STEPS = 6, 150, 5


class Steps:
    """Queries of every (step, layer) and the keys and values of every layer; 2 sequences."""

    def __init__(self, heads, device="cpu", dtype=torch.float32):
        self.heads, shape = heads, (LAYERS, 2, heads[1], FIRST + STEPS, 64)
        self.k, self.v = (randn(shape, dtype, device, seed) for seed in (1, 2))
        self.q = randn((STEPS, LAYERS, 2, heads[0], 1, 64), dtype, device, 3)

    def run(self, method, cache_of=None):
        """Outputs [STEPS, LAYERS, B, Hq, D] of ``method``."""
        cache_of = cache_of or self.contiguous
        outs = []
        for step in range(STEPS):
            for layer in range(LAYERS):
                cache = cache_of(step, layer)
                outs.append(method(self.q[step, layer], cache, layer_idx=layer))
        return torch.stack(outs).view(STEPS, LAYERS, *outs[0].shape[:2], 64)

    def contiguous(self, step, layer):
        length = FIRST + step
        return CachedKV(self.k[layer, :, :, :length], self.v[layer, :, :, :length])

    def paged(self, junk=0.0):
        """The same in pages, for one run; ``junk`` is what these hold before."""
        options = dict(dtype=self.k.dtype, device=self.k.device, batch=2, num_layers=LAYERS)
        cache = PagedKVCache(20, self.heads[1], 64, bounds=True, **options)
        cache.k.fill_(junk)
        cache.v.fill_(junk)

        def view(step, layer):
            new = FIRST if step == 0 else 1
            if layer == 0:
                cache.extend(new)
            rows = slice(FIRST + step - new, FIRST + step)
            cache.write(self.k[layer, :, :, rows], self.v[layer, :, :, rows], layer)
            return cache.layer(layer)

        return view

    def expected(self, rule):
        """float64 outputs; ``rule(step, layer, b) -> positions per head``."""
        out = torch.zeros(STEPS, LAYERS, 2, self.heads[0], 64, dtype=torch.float64)
        for step in range(STEPS):
            for layer in range(LAYERS):
                for b in range(2):
                    kept = rule(step, layer, b)
                    q, k, v = self.of(step, layer, b)
                    for h, positions in enumerate(kept):
                        at, g = sorted(positions), h // (self.heads[0] // self.heads[1])
                        weights = torch.softmax(k[g, at] @ q[h] / 8, -1)
                        out[step, layer, b, h] = weights @ v[g, at]
        return out

    def of(self, step, layer, b):
        length = FIRST + step
        q = self.q[step, layer, b, :, 0].double().cpu()
        return q, *(x[layer, b, :, :length].double().cpu() for x in (self.k, self.v))

    def everything(self, step):
        return [set(range(FIRST + step))] * self.heads[0]


def check(steps, method, rule):
    got, want = steps.run(method), steps.expected(rule)
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", HEADS)
def test_quest(heads):
    steps = Steps(heads)

    def rule(step, layer, b):
        q, k, _ = steps.of(step, layer, b)
        return steps.everything(step) if layer < 2 else quest(q, k, 64, 16)

    check(steps, Quest(64), rule)


@pytest.mark.parametrize("heads", HEADS)
def test_tidaldecode(heads):
    """Layers 2 and 4 choose; 3 and 5 use their lists over keys of their own."""
    steps = Steps(heads)

    def rule(step, layer, b):
        if layer in (0, 1, 2, 4):
            return steps.everything(step)
        q, k, _ = steps.of(step, layer - 1, b)
        return tidaldecode(q, k, 20)

    check(steps, TidalDecode(20, correction_layers=(4,)), rule)


@pytest.mark.parametrize("heads", HEADS)
def test_delta(heads):
    steps = Steps(heads)

    def rule(step, layer, b):
        if layer in (0, 1, 2, 5):
            return steps.everything(step)
        q, k, _ = steps.of(step, 2, b)
        return delta(q, k, 64, 16, 2)

    check(steps, Delta(64, recent_pages=2, delta_layers=(2, 5)), rule)


@pytest.mark.parametrize("heads", HEADS)
def test_recycled_attention(heads):
    """Full at steps 0 and 3; between, the lists of the full step and every newer token."""
    steps = Steps(heads)

    def rule(step, layer, b):
        if step in (0, 3):
            return steps.everything(step)
        full = step - step % 3
        q, k, _ = steps.of(full, layer, b)
        newer = set(range(FIRST + full, FIRST + step))
        return [kept | newer for kept in recycled(q, k, 30)]

    check(steps, Recycled(30, stride=3), rule)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("scale", [None, 1.0])
def test_tokenselect(heads, scale):
    """With the authors' scale 1.0 too, which makes votes of softmaxes that are nearly one-hot."""
    steps = Steps(heads)

    def rule(step, layer, b):
        q, k, _ = steps.of(step, layer, b)
        return tokenselect(q, k, 24, 4, 9, scale or 0.125)

    check(steps, TokenSelect(24, 4, 9, similarity=None, score_scale=scale), rule)


def test_dsa():
    steps = Steps((6, 3))
    check(steps, DSA(index_inputs, 33), lambda *at: dsa(*steps.of(*at)[:2], 33))


def similar_steps():
    """Steps whose queries are those of step 0, but for sequence 1 at step 2."""
    steps = Steps((6, 3))
    steps.q[1:] = steps.q[0] * 2
    steps.q[2:, :, 1] = randn(steps.q[2:, :, 1].shape, seed=8)[:1]
    return steps


def test_tokenselect_keeps_lists_while_queries_are_similar():
    """Sequence 1 selects anew at step 2, sequence 0 never; tokens newer than a list are added."""
    steps = similar_steps()

    def rule(step, layer, b):
        chosen_at = 2 if b == 1 and step >= 2 else 0
        q, k, _ = steps.of(chosen_at, layer, b)
        newer = set(range(FIRST + chosen_at, FIRST + step))
        return [kept | newer for kept in tokenselect(q, k, 24, 4, 9, 0.125)]

    check(steps, TokenSelect(24, 4, 9), rule)


def test_recycled_attention_by_similarity():
    steps = similar_steps()

    def rule(step, layer, b):
        chosen_at = 2 if b == 1 and step >= 2 else 0
        if step == chosen_at:
            return steps.everything(step)
        q, k, _ = steps.of(chosen_at, layer, b)
        newer = set(range(FIRST + chosen_at, FIRST + step))
        return [kept | newer for kept in recycled(q, k, 30)]

    check(steps, Recycled(30, stride=99, similarity=0.9), rule)


METHODS = (
    DenseDecode(),
    Quest(64),
    Quest(64, list_heads="kv"),
    TidalDecode(20, correction_layers=(4,)),
    TidalDecode(20, list_heads="one"),
    Delta(64, recent_pages=2, delta_layers=(2, 4)),
    Recycled(30, stride=3),
    Recycled(30, stride=3, similarity=0.5),
    TokenSelect(24, 4, 9),
    DSA(index_inputs, 33),
)
NAMES = [f"{type(m).__name__}-{i}" for i, m in enumerate(METHODS)]


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_pages_equal_a_contiguous_cache(device, method):
    steps = Steps((6, 3), device, torch.float32 if device == "cpu" else torch.bfloat16)
    method.reset()
    plain = steps.run(method)
    method.reset()
    pages = steps.run(method, steps.paged())
    torch.testing.assert_close(pages, plain, **TOLERANCE[device])


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_neighbours_do_not_matter_and_reset_forgets(method):
    steps = Steps((6, 3))
    method.reset()
    both = steps.run(method)
    assert (len(method.state) > 0) == (not isinstance(method, DenseDecode | DSA))
    method.reset()
    assert not method.state
    assert_bitwise(steps.run(method), both)
    method.reset()
    steps.q, steps.k, steps.v = steps.q[:, :, 1:], steps.k[:, 1:], steps.v[:, 1:]
    assert_bitwise(steps.run(method), both[:, :, 1:])


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_sequences_computed_one_by_one(method):
    steps = Steps((6, 3))
    method.reset()
    both = steps.run(method)
    method.reset()
    for step in range(STEPS):
        for layer in range(LAYERS):
            for b in range(2):
                one, cache = slice(b, b + 1), steps.contiguous(step, layer)
                cache = CachedKV(cache.k_cache[one], cache.v_cache[one])
                got = method(steps.q[step, layer, one], cache, layer_idx=layer, sequence=b)
                assert_bitwise(got[0, :, 0], both[step, layer, b])


WINDOWED = (
    (Quest(8, page_size=4, dense_layers=0), 8),
    (Quest(16, page_size=8, dense_layers=0, list_heads="one"), 16),
    (Delta(12, page_size=4, recent_pages=2, dense_layers=0, delta_layers=(0,)), 12),
    (TidalDecode(5, dense_layers=0), 6),
    (TokenSelect(3, 2, 4), 9),
    (TokenSelect(1, 0, 7, similarity=None), 8),
    (TokenSelect(2, 5, 1, similarity=-1.0), 8),
    (Recycled(4, stride=5), 4),
)


@pytest.mark.parametrize("which", range(len(WINDOWED)))
@given(first=st.integers(1, 40), steps=st.integers(1, 8), seed=st.integers(0, 99))
def test_no_token_is_lost_or_doubled(which, first, steps, seed):
    """Values are unit vectors, so the output is the weight that every token gets.

    Weights must be the softmax over the tokens that have one (none counts twice); the newest is
    among them, and all are while the budget covers them.
    """
    method, budget = WINDOWED[which]
    method.reset()
    k = randn((1, 1, 48, 64), seed=seed)
    v = torch.eye(48, 64).view(1, 1, 48, 64)
    for step in range(steps):
        length = first + step
        for layer in range(2):
            q = randn((1, 2, 1, 64), seed=100 + 10 * step + layer)
            cache = CachedKV(k[:, :, :length], v[:, :, :length])
            weights = method(q, cache, layer_idx=layer)[0, :, 0].double()
            scores = q[0, :, 0].double() @ k[0, 0, :length].double().T / 8
            seen = weights[:, :length] > 0
            want = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
            torch.testing.assert_close(weights[:, :length], want, rtol=1e-4, atol=1e-7)
            assert seen[:, -1].all() and (weights[:, length:] == 0).all()
            if length <= budget:
                assert seen.all()


@pytest.mark.parametrize("method", [Recycled(4, stride=99), TokenSelect(3, 2, 4, similarity=-1.0)])
def test_new_tokens_in_the_place_of_rejected_ones_are_seen(method):
    """Lists are chosen at 40 tokens; then tokens are taken back, others come, of 1 and 3 rows."""
    method.reset()
    k, v = randn((1, 1, 48, 64)), torch.eye(48, 64).view(1, 1, 48, 64)
    newer = set()  # than the lists
    for length, rows in ((40, 8), (36, 1), (37, 1), (34, 3), (35, 1), (43, 8)):
        begin = length - rows
        k[:, :, begin:length] = randn((1, 1, rows, 64), seed=length)
        weights = method(randn((1, 2, rows, 64)), CachedKV(k[:, :, :length], v[:, :, :length]))
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, rows))
        if length < 40 or newer:
            newer = {j for j in newer if j < begin} | {*range(begin, length)}
        assert all((weights[0, :, -1, j] > 0).all() for j in newer)


def test_bounds_follow_a_growing_and_a_cut_cache():
    """Over a contiguous cache Quest keeps its own bounds: one row, eight rows, rows taken back."""
    method, k = Quest(32, page_size=8, dense_layers=0), randn((2, 3, 200, 64))
    for length, rows in ((50, 1), (51, 1), (59, 8), (56, 2), (57, 1), (120, 3), (41, 1), (200, 8)):
        k[:, :, length - rows : length] = randn((2, 3, rows, 64), seed=length)
        cache = CachedKV(k[:, :, :length], k[:, :, :length])
        method(randn((2, 6, rows, 64)), cache)
        known, held = method.state[0, 0]
        want = page_bounds(k[:, :, :length], 8)
        assert known == length
        assert torch.equal(held[:, : want.shape[1]], want)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_draft_rows(method):
    """Rows of one call see what is before them only: later rows and keys change nothing of them."""
    steps = Steps((6, 3))
    q = randn((2, 6, 4, 64), seed=5)
    whole = []
    for poison in (False, True):
        method.reset()
        for layer in range(LAYERS):
            k, v = steps.k[layer].clone(), steps.v[layer].clone()
            if poison and not isinstance(method, Quest | Recycled | TokenSelect):
                k[:, :, -1] += 3.0  # the last row's own key
            v[:, :, -1] += float(poison)
            out = method(q, CachedKV(k, v), layer_idx=layer)
        whole.append(out[:, :, :3])
    assert_bitwise(whole[0], whole[1])


def test_bad_parameters_are_named():
    q, k = torch.zeros(1, 4, 1, 64), torch.zeros(1, 2, 40, 64)
    with pytest.raises(ValueError, match="list_heads"):
        Quest(16, list_heads="head", dense_layers=0)(q, CachedKV(k, k))
    lens = torch.tensor([30], dtype=torch.int32)
    with pytest.raises(ValueError, match="bounds"):
        Quest(16, dense_layers=0)(q, CachedKV(k, k, seq_lens=lens))
    with pytest.raises(ValueError, match="k: "):
        Quest(20, dense_layers=0)(q, CachedKV(k, k))
