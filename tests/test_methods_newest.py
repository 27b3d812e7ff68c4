"""Numbers beside a cache follow its lengths, whichever layer has looked for the newest rows."""

import contextlib
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnsieve import CachedKV
from attnsieve.methods import FASA, LowRank
from attnsieve.methods.newest import newest_rows
from cases import randn

LAYERS, HEADS, PAGE, PAGES = 3, 3, 16, 5
PROMPTS = torch.tensor([30, 41])
ROWS = (1, 1, 3, 1, 1)
METHODS = (LowRank(12, rank=16, recent=2), FASA(12, pairs=8))


class Grown:
    """Two sequences whose keys appear step by step in memory of NaN, their lengths in place."""

    def __init__(self, paged):
        self.lengths = PROMPTS.to(torch.int32)
        self.k = randn((LAYERS, 2, HEADS, PAGE * PAGES, 64), seed=1)
        self.table = None
        shape = (LAYERS, 2, HEADS, PAGE * PAGES, 64)
        if paged:
            self.table = torch.randperm(2 * PAGES).view(2, PAGES).int()
            shape = (LAYERS, 2 * PAGES, PAGE, HEADS, 64)
        self.memory = torch.full(shape, torch.nan)
        for b, length in enumerate(PROMPTS):
            self.write(b, range(length))

    def write(self, b, positions):
        for j in positions:
            if self.table is None:
                self.memory[:, b, :, j] = self.k[:, b, :, j]
            else:
                self.memory[:, int(self.table[b, j // PAGE]), j % PAGE] = self.k[:, b, :, j]

    def extend(self, rows):
        for b, length in enumerate(self.lengths.tolist()):
            self.write(b, range(length, length + rows))
        self.lengths += rows

    def cache(self, layer):
        k = self.memory[layer]
        return CachedKV(k, k, block_table=self.table, seq_lens=self.lengths)


def prefilled(method):
    method.reset()
    for layer in range(LAYERS):
        q, k = (randn((2, heads, 40, 64), seed=20 + layer) for heads in (6, HEADS))
        method.prefill(q, k, layer_idx=layer)
    return method


def expected(method, layer, b, k):
    """float64 numbers of keys ``[Hkv, T, 64]``."""
    if isinstance(method, LowRank):
        return k.double() @ method.fits[0, layer].to_k[b].double()
    dims = method.dims[0, layer][b]
    return torch.stack([k[h, :, dims[h]] for h in range(HEADS)]).double()


def check_numbers(method, grown, layer):
    for b, length in enumerate(grown.lengths.tolist()):
        want = expected(method, layer, b, grown.k[layer, b, :, :length])
        got = method.state[0, layer][b, :, :length].double()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=lambda x: type(x).__name__)
def test_every_layer_has_the_numbers_of_every_key(method, paged, inference):
    with torch.inference_mode() if inference else contextlib.nullcontext():
        method, grown = prefilled(method), Grown(paged)
        for rows in ROWS:
            grown.extend(rows)
            for layer in range(LAYERS):
                q = randn((2, 6, rows, 64), seed=layer)
                assert method(q, grown.cache(layer), layer_idx=layer).isfinite().all()
                check_numbers(method, grown, layer)


@pytest.mark.parametrize("paged", [False, True])
def test_lengths_that_changed_between_two_layers(paged):
    """Outside of inference mode a tensor counts its changes: those of lengths are noticed."""
    method, grown = prefilled(LowRank(12, rank=16, recent=2)), Grown(paged)
    grown.extend(1)
    for layer in range(LAYERS):
        method(randn((2, 6, 1, 64)), grown.cache(layer), layer_idx=layer)
    for layer in range(LAYERS):
        grown.extend(1)
        method(randn((2, 6, LAYERS, 64)), grown.cache(layer), layer_idx=layer)
        check_numbers(method, grown, layer)


def test_what_is_shared_and_what_is_not():
    state, grown = {}, Grown(paged=True)

    def ask(layer, rows=1, sequence=0, cache=None):
        return newest_rows(state, (sequence, layer), cache or grown.cache(0), 2, rows)

    first = ask(1)
    assert ask(2) is first
    other = CachedKV(grown.memory[0], grown.memory[0], grown.table, grown.lengths.clone())
    assert ask(3, sequence=1) is not first  # of other lengths, perhaps
    assert ask(3, cache=other) is not first
    first = ask(1)
    assert ask(2, rows=2) is not first
    first = ask(1)
    assert ask(1) is not first  # a new step
    first = ask(1)
    grown.lengths += 1
    assert ask(2) is not first


def test_a_newest_token_without_a_page_has_the_numbers_of_zeros():
    method, grown = prefilled(LowRank(12, rank=16, recent=2)), Grown(paged=True)
    for layer in range(LAYERS):
        method(randn((2, 6, 1, 64)), grown.cache(layer), layer_idx=layer)
    grown.extend(1)
    grown.table[1, int(grown.lengths[1] - 1) // PAGE] = -1
    method(randn((2, 6, 1, 64)), grown.cache(0))
    assert (method.state[0, 0][1, :, int(grown.lengths[1]) - 1] == 0).all()


class Calls(TorchDispatchMode):
    """Counts the ops that run something: those that return new tensors, or write."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func._schema.returns
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in returned)
        if not is_view and func is not torch.ops.aten._unsafe_view.default:
            self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("layout", "most"), [("full", (6, 6)), ("lengths", (7, 7)), ("pages", (8, 8))]
)
def test_a_layer_makes_few_calls(layout, most):
    """Two products or gathers, reading and writing the newest numbers, and three ops of ours."""
    for method, limit in zip(METHODS, most, strict=True):
        grown = Grown(layout == "pages")
        prefilled(method)
        for step in range(2):
            grown.extend(1)
            for layer in range(LAYERS):
                q, cache = randn((2, 6, 1, 64)).bfloat16(), grown.cache(layer)
                k = cache.k_cache.bfloat16()
                cache = CachedKV(k, k, cache.block_table, cache.seq_lens)
                if layout == "full":
                    k = k[:, :, : 30 + step]
                    cache = CachedKV(k, k)
                with Calls() as calls:
                    method(q, cache, layer_idx=layer)
        assert sum(calls.names.values()) <= limit, calls.names
