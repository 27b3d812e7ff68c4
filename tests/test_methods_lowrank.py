"""LowRank attends to the tokens whose proxies score best; the rule is in ``decode_rules.py``."""

import pytest
import torch

from attnsieve import CachedKV, PagedKVCache
from attnsieve.methods import DenseDecode, LowRank
from cases import randn
from decode_rules import best, lowrank
from numerics import assert_bitwise
from test_methods_decode import FIRST, HEADS, LAYERS, STEPS, TOLERANCE, Steps, check


def fitted(steps, **options):
    """LowRank after a prefill of all layers."""
    method = LowRank(30, rank=16, recent=2, **options)
    shape = (LAYERS, 2, steps.heads[0], FIRST, 64)
    prompt = randn(shape, steps.k.dtype, steps.k.device, 4)
    for layer in range(LAYERS):
        method.prefill(prompt[layer], steps.k[layer, :, :, :FIRST], layer_idx=layer)
    return method


@pytest.mark.parametrize("share", ["kv_head", "query_head"])
@pytest.mark.parametrize("heads", HEADS)
def test_lowrank(heads, share):
    steps = Steps(heads)
    method = fitted(steps, share=share)

    def rule(step, layer, b):
        q, k, _ = steps.of(step, layer, b)
        fit = method.fits[0, layer]
        return lowrank(q, k, fit.to_q[b].double(), fit.to_k[b].double(), 30, 2)

    check(steps, method, rule)


def test_lowrank_without_a_fit_is_dense():
    steps = Steps((6, 3))
    assert_bitwise(steps.run(LowRank(30)), steps.run(DenseDecode()))


@pytest.mark.parametrize("share", ["kv_head", "query_head"])
def test_lowrank_in_pages_again_and_of_one_sequence(device, share):
    steps = Steps((6, 3), device, torch.float32 if device == "cpu" else torch.bfloat16)
    method = fitted(steps, share=share)
    plain = steps.run(method)
    assert all((0, layer) in method.state for layer in range(LAYERS))
    method.reset()
    assert not method.state
    pages = steps.run(method, steps.paged())
    torch.testing.assert_close(pages, plain, **TOLERANCE[device])
    assert_bitwise(steps.run(fitted(steps, share=share)), plain)


def test_lowrank_keeps_what_the_first_piece_taught():
    """Its keys are new all the same: what is beside the cache is made again."""
    steps, piece = Steps((6, 3)), slice(FIRST - 9, FIRST)
    method = fitted(steps)
    learned = dict(method.fits)
    for layer in range(LAYERS):
        cache = CachedKV(*(x[layer, :, :, : FIRST - 9] for x in (steps.k, steps.v)))
        method(steps.q[0, layer], cache, layer_idx=layer)
        q, k = randn((2, 6, 9, 64)), steps.k[layer][:, :, piece]
        method.prefill(q, k, layer_idx=layer, begin=FIRST - 9)
    assert all(method.fits[place] is kept for place, kept in learned.items())
    assert_bitwise(steps.run(method), steps.run(fitted(steps)))


def test_lowrank_sees_new_tokens_in_the_place_of_rejected_ones():
    steps = Steps((6, 3))
    method, q = fitted(steps), randn((2, 6, 3, 64), seed=9)
    k = steps.k[0].clone()

    def step(rows, length):
        cache = CachedKV(k[:, :, :length], steps.v[0][:, :, :length])
        return method(q[:, :, :rows], cache)

    step(1, FIRST)
    step(3, FIRST + 3)
    k[:, :, FIRST:] = randn((2, 3, STEPS, 64), seed=10)
    again = step(3, FIRST + 3)
    method.reset()
    assert_bitwise(step(3, FIRST + 3), again)


def test_lowrank_in_pages_that_held_something_else():
    """Tokens behind the length and pages of nobody hold NaN: proxies of those are never chosen."""
    steps = Steps((6, 3))
    method = fitted(steps)
    plain = steps.run(method)
    method.reset()
    pages = steps.run(method, steps.paged(torch.nan))
    torch.testing.assert_close(pages, plain, **TOLERANCE["cpu"])


class Published:
    """The paper's decode steps of one sequence and layer, head by head in float64.

    ``lists``: positions of each head's last list.
    """

    def __init__(self, fit, b, k):
        own = (x[b].double().clone() for x in (fit.to_k, fit.from_q, fit.from_k))
        to_k, self.from_q, self.from_k = own
        group = to_k.shape[0] // k.shape[0]
        self.proxies = [k[h // group] @ to_k[h] for h in range(to_k.shape[0])]
        self.lists = [[]] * to_k.shape[0]

    def numbers(self, h, rows, keys):
        """Numbers ``[G, r]`` of the queries of fit head h; notes those of the newest key."""
        from_q, from_k, k = self.from_q[h], self.from_k[h], keys[-1]
        near, a = keys[self.lists[h]], self.proxies[h][self.lists[h]]
        of_k = k @ from_k.T @ (from_k @ from_k.T).inverse()
        of_q = torch.empty(len(rows), len(of_k), dtype=torch.float64)
        for _ in range(2):
            inverse = (from_q @ from_q.T + a.T @ a + of_k.outer(of_k)).inverse()
            for g, q in enumerate(rows):
                of_q[g] = (q @ from_q.T + q @ near.T @ a + q @ k * of_k) @ inverse
            pull = sum(row.outer(row) for row in of_q) / len(rows)
            right = sum((q @ k) * row for q, row in zip(rows, of_q, strict=True)) / len(rows)
            of_k = (k @ from_k.T + right) @ (from_k @ from_k.T + pull).inverse()
        self.from_q[h] += torch.linalg.pinv(of_q) @ (rows - of_q @ from_q)
        self.from_k[h] -= of_k.outer(of_k @ from_k - k) / (of_k @ of_k)
        self.proxies[h] = torch.cat([self.proxies[h], of_k[None]])
        return of_q

    def step(self, q, k, list_heads, budget, recent):
        """Positions that each query head attends to; the lists are kept."""
        heads, length = len(self.proxies), k.shape[1]
        group, kv_group = len(q) // heads, len(q) // len(k)
        scores = []
        for h in range(heads):
            of_q = self.numbers(h, q[h * group :][:group], k[h * len(k) // heads])
            scores += [self.proxies[h] @ row for row in of_q]
        per_list = dict(q=1, kv=kv_group, one=len(q))[list_heads]
        kept = []
        for h in range(len(q)):
            votes = torch.stack(scores[h // per_list * per_list :][:per_list]).amax(0)
            votes = votes[: length - recent]
            kept.append(sorted(best(votes, budget - recent) | {*range(length - recent, length)}))
        self.lists = kept[::group]
        return kept


@pytest.mark.parametrize(
    ("share", "list_heads"),
    [("kv_head", "kv"), ("kv_head", "one"), ("query_head", "q"), ("query_head", "kv")],
)
@pytest.mark.parametrize("heads", HEADS)
def test_refined_steps_are_the_published_ones(heads, share, list_heads):
    """With one list per query head, fits of query heads, it is the paper's algorithm."""
    steps = Steps(heads)
    method = fitted(steps, share=share, list_heads=list_heads, refine=True)
    known = {}

    def rule(step, layer, b):
        q, k, _ = steps.of(step, layer, b)
        if step == 0:
            known[layer, b] = Published(method.fits[0, layer], b, k[:, :-1])
        return known[layer, b].step(q, k, list_heads, 30, 2)

    check(steps, method, rule)
    for (layer, b), want in known.items():
        found, proxies = method.state["refined", 0, layer].fit, method.state[0, layer][b]
        torch.testing.assert_close(found.from_q[b].double(), want.from_q, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.from_k[b].double(), want.from_k, rtol=1e-3, atol=1e-4)
        numbers = torch.stack(want.proxies)
        got = proxies[:, : numbers.shape[1]].double()
        torch.testing.assert_close(got, numbers, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("share", ["kv_head", "query_head"])
def test_refined_in_pages_again_and_of_one_sequence(device, share):
    steps = Steps((6, 3), device, torch.float32 if device == "cpu" else torch.bfloat16)
    method = fitted(steps, share=share, refine=True)
    plain = steps.run(method)
    method.reset()
    assert not method.state
    pages = steps.run(method, steps.paged(torch.nan))
    torch.testing.assert_close(pages, plain, **TOLERANCE[device])
    assert_bitwise(steps.run(fitted(steps, share=share, refine=True)), plain)
    assert not torch.equal(steps.run(fitted(steps, share=share)), plain)


def test_refined_numbers_outlive_a_cache_that_has_grown():
    """Pages have room for all from the first step on; a contiguous cache takes more at times."""
    q, k = randn((2, 6, 60, 64)), randn((2, 3, 60, 64), seed=2)
    pages, found = PagedKVCache(20, 3, 64, batch=2, dtype=torch.float32), []
    for paged in (False, True):
        method = LowRank(12, rank=16, recent=2, refine=True)
        method.prefill(q[:, :, :20], k[:, :, :20])
        for length in range(21, 61):
            if paged:
                new = slice(0 if length == 21 else length - 1, length)
                pages.append(k[:, :, new], k[:, :, new])
            cache = pages.layer() if paged else CachedKV(*(k[:, :, :length],) * 2)
            method(q[:, :, length - 1 : length], cache)
        found.append(method.state[0, 0][:, :, :60])
    torch.testing.assert_close(*found)


def test_refined_steps_beside_steps_of_several_rows_and_tokens_taken_back():
    """What stands in a rejected token's place is no resident, nor what lies behind the length."""
    steps, shape = Steps((6, 3)), (2, 3, 8, 64)
    whole = []
    for junk in (0.0, torch.nan):
        method = fitted(steps, refine=True)
        k = torch.cat([steps.k[0][:, :, :FIRST], randn(shape, seed=10)], 2)
        for length, rows in ((FIRST + 6, 1), (FIRST + 2, 2), (FIRST + 3, 1), (FIRST + 4, 1)):
            k[:, :, length:] = junk
            k[:, :, length - rows : length] = randn((2, 3, rows, 64), seed=length)
            lengths = torch.full((2,), length, dtype=torch.int32)
            q = randn((2, 6, rows, 64), seed=length + 1)
            whole.append(method(q, CachedKV(k, k, seq_lens=lengths)))
        assert method.state["refined", 0, 0].fit.from_k.isfinite().all()
    for plain, beside_nan in zip(whole[:4], whole[4:], strict=True):
        assert_bitwise(beside_nan, plain)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(offload=True), "refine: not with offload"),
        (dict(list_heads="q"), "list_heads: refine"),
    ],
)
def test_what_refinement_cannot_be_combined_with(options, text):
    with pytest.raises(ValueError, match=text):
        LowRank(30, refine=True, **options)
