"""LowRank attends to the tokens whose proxies score best; the rule is in ``decode_rules.py``."""

import pytest
import torch

from attnsieve import CachedKV
from attnsieve.methods import DenseDecode, LowRank
from cases import randn
from decode_rules import lowrank
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
    assert len(method.state) == LAYERS
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
