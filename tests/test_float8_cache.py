"""Float8 caches end to end: what is appended, scored, selected and attended to.

Right is what dequantised keys and values give in float64, with torch's own float8 conversion.
"""

import pytest
import torch

import attnsieve
from attnsieve import CachedKV, PagedKVCache
from attnsieve.methods import (
    FASA,
    Delta,
    DenseDecode,
    LowRank,
    Quest,
    Recycled,
    Squeezed,
    TidalDecode,
    TokenSelect,
    TriAttention,
)
from cases import capture, pairwise, randn
from numerics import assert_attention_close, assert_bitwise, pytorch_same_dtype
from topk_rules import expected_lists, expected_lse, paged, seen_pairs

E4M3 = torch.float8_e4m3fn
DIM = 64
TOLERANCE = dict(cpu=dict(rtol=1e-5, atol=1e-5), cuda=dict(rtol=2e-2, atol=2e-2))


def number_dtype(device):
    """Of queries and new rows."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def encoded(x, scale):
    """Codes of x [..., Hkv, n, D], as torch makes them."""
    return (x.float() / scale[:, None, None]).clamp(-448, 448).to(E4M3)


def decoded(codes, scale):
    return codes.double() * scale.double()[:, None, None]


CASES = pairwise(
    heads=((8, 8), (8, 2), (6, 3)),
    rows=(1, 3),
    rule=("quest", "exact"),
    page_size=(1, 16),
    cache=(None, "paged"),
    lists=("q", "kv", "one"),
)


@pytest.mark.parametrize("pick", CASES, ids=[str(i) for i in range(len(CASES))])
def test_topk_attention_equals_the_rule_over_dequantised_keys(device, pick):
    """Key scales are powers of two, so that every score is exact; lists over heads need them."""
    heads, rows, unit, lengths = pick["heads"], pick["rows"], pick["page_size"], [150, 37]
    generator = torch.Generator().manual_seed(7)
    shapes = [(2, heads[0], rows, DIM), *[(2, heads[1], 160, DIM)] * 2]
    q, k, v = (torch.randint(-3, 4, shape, generator=generator).float() for shape in shapes)
    k_scale = 2.0 ** (torch.arange(heads[1]) % 3 - 1)
    v_scale = torch.linspace(2, 0.3, heads[1])
    numbers = [decoded(x.to(E4M3), s) for x, s in ((k, k_scale), (v, v_scale))]
    pick = pick | dict(k=64, sink_tokens=2, recent_tokens=1, causal=True)
    num_lists = {"q": heads[0], "kv": heads[1], "one": 1}[pick["lists"]]
    lists = expected_lists(pick["rule"], q.double(), numbers[0], lengths, num_lists, pick)
    options = {name: pick[name] for name in ("k", "page_size", "sink_tokens", "recent_tokens")}
    codes, table = [k, v], dict(block_table=None)
    if pick["cache"] == "paged" or pick["rule"] == "quest":
        codes, table = paged(k, v, lengths, unit, pick["rule"])
    if pick["cache"] is None:
        codes = [k, v]
        if pick["rule"] == "quest":  # the pages of the table, in the sequence's order
            pages = table["block_table"].long().clamp(0, len(table["bounds"]) - 1)
            table = dict(block_table=None, bounds=table["bounds"][pages])
    codes = [x.to(E4M3).to(device) for x in codes]  # NaN is a code
    dtype = number_dtype(device)
    options |= {name: x if x is None else x.to(device) for name, x in table.items()}
    if options.get("bounds") is not None:
        options["bounds"] = options["bounds"].to(dtype)
    out, index, lse = attnsieve.topk_attention(
        q.to(device, dtype),
        *codes,
        score=pick["rule"],
        num_lists=num_lists,
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        k_scale=k_scale.to(device),
        v_scale=v_scale.to(device),
        return_index=True,
        return_lse=True,
        **options,
    )
    for (b, g, i), kept in lists.items():
        where = (b, i, g) if index.per_row else (b, g)
        entries = index.indices[where][: int(index.counts[where])].tolist()
        assert entries == sorted({j // unit for j in kept}), (b, g, i)
    seen = seen_pairs(lists, 2, heads[0], rows, 160)
    ref, _ = pytorch_same_dtype(q.double(), *numbers, seen.long())
    pt = pytorch_same_dtype(*(x.to(dtype) for x in (q, *numbers)), seen.long())
    lse_ref = expected_lse(q, numbers[0], seen, None)
    assert_attention_close(out.cpu(), lse.cpu(), (ref, lse_ref), pt, str(pick))


class Appended:
    """A paged float8 cache of two layers with bounds, and the rows that were appended."""

    def __init__(self, device, kv_heads=2, layers=2, length=150):
        self.dtype = number_dtype(device)
        self.scales = dict(
            k_scale=torch.linspace(0.01, 0.3, layers * kv_heads).view(layers, kv_heads),
            v_scale=torch.linspace(0.2, 0.02, kv_heads),
        )
        self.cache = PagedKVCache(
            40,
            kv_heads,
            DIM,
            batch=2,
            num_layers=layers,
            dtype=E4M3,
            score_dtype=self.dtype,
            device=device,
            bounds=True,
            **self.scales,
        )
        shape = (layers, 2, kv_heads, length, DIM)
        self.k, self.v = (randn(shape, self.dtype, device, seed) for seed in (1, 2))
        for rows in (slice(0, length - 12), slice(length - 12, length - 1), slice(-1, None)):
            self.cache.extend(len(range(length)[rows]))
            for layer in range(layers):
                self.cache.write(self.k[layer, :, :, rows], self.v[layer, :, :, rows], layer)

    def codes(self, layer):
        """What each layer holds, [B, Hkv, T, D]."""
        own = self.scales["k_scale"][layer], self.scales["v_scale"]
        rows = self.k[layer], self.v[layer]
        return [encoded(x.cpu(), scale) for x, scale in zip(rows, own, strict=True)]

    def numbers(self, layer):
        own = self.scales["k_scale"][layer], self.scales["v_scale"]
        return [decoded(x, scale) for x, scale in zip(self.codes(layer), own, strict=True)]


def test_a_cache_holds_codes_and_their_bounds(device):
    appended = Appended(device)
    cache = appended.cache
    assert cache.k.dtype == cache.v.dtype == E4M3 and cache.bounds.dtype == appended.dtype
    for layer in range(2):
        for x, codes in zip((cache.k, cache.v), appended.codes(layer), strict=True):
            for b in range(2):
                pages = [p for p in cache.block_table[b].tolist() if p >= 0]
                held = torch.cat([x[layer, p] for p in pages])[:150].transpose(0, 1).cpu()
                assert torch.equal(held.view(torch.uint8), codes[b].view(torch.uint8))
        keys = appended.codes(layer)[0].to(appended.dtype)
        for b in range(2):
            for slot, page in enumerate(cache.block_table[b, :10].tolist()):
                own = keys[b, :, 16 * slot : 16 * slot + 16]
                wanted = torch.stack([own.amin(1), own.amax(1)], 1)
                assert_bitwise(cache.bounds[layer, page].cpu(), wanted)


def test_a_step_equals_attention_over_dequantised_rows(device):
    """With a budget of everything, and by the caller's scores."""
    appended = Appended(device)
    cache, q = appended.cache, randn((2, 8, 1, DIM), appended.dtype, device, 3)
    scores = randn((2, 2, 150), device=device, seed=4)
    chosen = dict(score=scores, k=30, recent_tokens=0)
    for layer in range(2):
        k, v = appended.numbers(layer)
        for options in (dict(bounds=cache.bounds[layer], k=640), chosen):
            where = cache.where | cache.scales(layer)
            caches = cache.k[layer], cache.v[layer]
            out, index, lse = attnsieve.topk_attention(
                q, *caches, return_index=True, return_lse=True, **options, **where
            )
            seen = torch.ones(2, 8, 1, 150, dtype=torch.bool)
            if options is chosen:
                best = scores.cpu().topk(30).indices.repeat_interleave(4, 1)
                seen = torch.zeros(2, 8, 150).scatter(2, best, 1.0).bool().unsqueeze(2)
            rows = q.cpu()
            ref, _ = pytorch_same_dtype(rows.double(), k, v, seen.long())
            pt = pytorch_same_dtype(*(x.to(q.dtype) for x in (rows, k, v)), seen.long())
            wanted = ref, expected_lse(rows, k, seen, None)
            assert_attention_close(out.cpu(), lse.cpu(), wanted, pt)
            again = attnsieve.topk_attention(q, *caches, reuse=index, **where)
            assert_bitwise(again, out)


METHODS = (
    DenseDecode(),
    Quest(64),
    Quest(64, list_heads="one"),
    TidalDecode(20, correction_layers=(1,), dense_layers=0),
    Delta(64, recent_pages=2, dense_layers=0, delta_layers=(1,)),
    Recycled(30, stride=3),
    TokenSelect(24, 4, 9),
    LowRank(24, rank=16, recent=5),
    FASA(24, pairs=8),
    Squeezed(0.8, observed=20),
    TriAttention(10000.0 ** -(torch.arange(0, DIM, 2) / DIM), 24, recent=5, keep_prompt=False),
)
NAMES = [f"{type(m).__name__}-{i}" for i, m in enumerate(METHODS)]


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_methods_equal_those_over_dequantised_rows(method):
    appended = Appended("cpu", layers=3)
    results = []
    for coded in (True, False):
        method.reset()
        for layer in range(3):
            prompt = randn((2, 8, 149, DIM), seed=layer)
            method.prefill(prompt, appended.k[layer, :, :, :149], layer_idx=layer)
        for step in range(2):
            for layer in range(3):
                q = randn((2, 8, 1, DIM), seed=10 * step + layer)
                cache = appended.cache.layer(layer)
                if not coded:
                    cache = CachedKV(*(x.float() for x in appended.numbers(layer)))
                results.append(method(q, cache, layer_idx=layer))
    half = len(results) // 2
    for got, wanted in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(got, wanted, **TOLERANCE["cpu"])


@pytest.mark.usefixtures("cuda_backend")
@pytest.mark.parametrize("score", ["quest", "exact"])
def test_a_step_in_a_cuda_graph(score):
    appended = Appended("cuda")
    cache = appended.cache
    cache.reserve(20)
    sizes = ((2, 8, 1, DIM), (2, 2, 1, DIM), (2, 2, 1, DIM))
    q, k, v = (randn(shape, torch.bfloat16, "cuda", 5) for shape in sizes)
    bounds = cache.bounds[1] if score == "quest" else None

    def step():
        cache.write(k, v, 1)
        where = cache.where | cache.scales(1)
        return attnsieve.topk_attention(
            q, cache.k[1], cache.v[1], k=64, score=score, bounds=bounds, **where
        )

    cache.extend(1)
    graph, out = capture(step)
    for n in (6, 7, 8):
        cache.extend(1)
        for x, shape in zip((q, k, v), sizes, strict=True):
            x.copy_(randn(shape, torch.bfloat16, "cuda", n))
        graph.replay()
        assert_bitwise(out, step())


ONES = torch.ones(2)
BAD_SCALES = (
    ("k_scale: must be given", dict(k_scale=None)),
    ("v_scale: must be given", dict(v_scale=None)),
    (r"k_scale: expected float32 \[2\]", dict(k_scale=torch.ones(3))),
    (r"v_scale: expected float32 \[2\]", dict(v_scale=ONES.double())),
)


@pytest.mark.parametrize("score", ["exact", torch.zeros(2, 1, 50)], ids=["exact", "given"])
@pytest.mark.parametrize("text, change", [*BAD_SCALES, ("k_scale: has no meaning", {})])
def test_bad_scales_are_named(text, change, score):
    cache = torch.zeros(2, 2, 50, DIM).to(E4M3)
    if not change:
        cache = cache.float()
    options = dict(k_scale=ONES, v_scale=ONES) | change
    with pytest.raises(ValueError, match=text):
        attnsieve.topk_attention(
            torch.zeros(2, 4, 1, DIM), cache, cache, score=score, k=8, **options
        )


@pytest.mark.parametrize("text, change", [*BAD_SCALES, ("k_scale: has no meaning", None)])
def test_a_cache_refuses_bad_scales(text, change):
    options = dict(k_scale=ONES, v_scale=ONES, dtype=E4M3)
    options |= dict(dtype=torch.float16) if change is None else change
    with pytest.raises(ValueError, match=text):
        PagedKVCache(4, 2, 16, num_layers=3, **options)


def test_a_scale_per_layer_needs_every_layer():
    with pytest.raises(ValueError, match=r"k_scale: expected float32 \[2\]"):
        PagedKVCache(
            4, 2, 16, num_layers=3, dtype=E4M3, k_scale=torch.ones(2, 2), v_scale=torch.ones(2)
        )


def test_quest_over_codes_needs_bounds():
    codes = torch.zeros(2, 2, 50, DIM).to(E4M3)
    cache = CachedKV(codes, codes, k_scale=ONES, v_scale=ONES)
    with pytest.raises(ValueError, match="cache: Quest needs its bounds"):
        Quest(32, dense_layers=0)(torch.zeros(2, 4, 1, DIM), cache)
