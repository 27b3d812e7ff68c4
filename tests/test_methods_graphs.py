"""Decode methods that learn from a prefill: their steps in CUDA graphs, over a growing cache."""

import copy

import pytest
import torch

from attnsieve import PagedKVCache
from attnsieve.methods import FASA, LowRank, Squeezed, TriAttention
from cases import capture, randn
from numerics import assert_bitwise

pytestmark = pytest.mark.usefixtures("cuda_backend")

LAYERS, PROMPT, HEADS, KV_HEADS, DIM = 2, 150, 6, 3, 64
INV_FREQ = 10000.0 ** -(torch.arange(0, DIM, 2) / DIM)
METHODS = (
    LowRank(30, rank=16, recent=5),
    FASA(30, pairs=8),
    Squeezed(0.8, share=0.1, observed=20),
    Squeezed(0.6, share=0.2, observed=20, coarse=0.05),
    TriAttention(INV_FREQ, 30, period=99, recent=5, keep_prompt=False),
    TriAttention(INV_FREQ, 30, period=0, recent=5, keep_prompt=False, aggregate="max"),
)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", METHODS, ids=lambda x: type(x).__name__)
def test_a_step_in_a_graph(method, rows):
    """Each replay equals the eager step of a method of the same past."""
    method = copy.copy(method)
    on = dict(dtype=torch.bfloat16, device="cuda")
    cache = PagedKVCache(40, KV_HEADS, DIM, batch=2, num_layers=LAYERS, **on)
    k, v = (randn((2, KV_HEADS, PROMPT, DIM), seed=seed, **on) for seed in (1, 2))
    method.reset()
    cache.extend(PROMPT)
    for layer in range(LAYERS):
        method.prefill(randn((2, HEADS, PROMPT, DIM), seed=3 + layer, **on), k, layer_idx=layer)
        cache.write(k, v, layer)
    cache.reserve(8 * rows)
    q = torch.empty(LAYERS, 2, HEADS, rows, DIM, **on)
    new = [torch.empty(2, KV_HEADS, rows, DIM, **on) for _ in range(2)]

    def fill(seed):
        for place, x in enumerate((q, *new)):
            x.copy_(randn(x.shape, seed=10 * seed + place, **on))
        cache.extend(rows)

    def attended(method):
        every = range(LAYERS)
        return torch.stack([method(q[x], cache.layer(x), layer_idx=x) for x in every])

    def step():
        for layer in range(LAYERS):
            cache.write(*new, layer)
        return attended(method)

    fill(0)
    step()  # makes what later steps write in place
    eager = copy.copy(method)
    eager.state = copy.deepcopy(method.state)
    fill(1)
    graph, out = capture(step)
    graph.replay()
    assert_bitwise(out, attended(eager))
    for seed in (2, 3, 4):
        fill(seed)
        graph.replay()
        assert_bitwise(out, attended(eager))
