"""The oracles of the decode family against independent statements of what they mean."""

import itertools
import math

import pytest
import torch

from attnsieve import reference
from attnsieve import reference_decode as oracle
from attnsieve.token_index import TokenIndex
from cases import BAD_IDS, randn
from layouts import deal_pages, fill_pages, page_bounds
from numerics import assert_bitwise

HEADS = ((4, 4), (4, 2), (6, 1), (6, 3))  # (num_heads, num_kv_heads)
NAN, INF = math.nan, math.inf


def close(actual, expected, what=""):
    torch.testing.assert_close(
        actual, expected, rtol=1e-12, atol=1e-12, msg=lambda m: f"{what} {m}"
    )


def problem(heads=(4, 2), rows=1, length=45, batch=2, dim=8, seed=0):
    q = randn((batch, heads[0], rows, dim), seed=seed)
    k, v = (randn((batch, heads[1], length, dim), seed=seed + s) for s in (1, 2))
    return q, k, v


def paged(k, v, lengths, page_size, seed=0, fill=NAN):
    """k and v [B, H, S, D] in shuffled pages; unused rows hold ``fill``, spare entries are bad."""
    table = deal_pages(lengths, -(-k.shape[2] // page_size) + 1, page_size, seed)
    k, v = (fill_pages(x, lengths, table, page_size, fill) for x in (k, v))
    return k, v, dict(block_table=table, seq_lens=torch.tensor(lengths).int())


def random_lists(shape, limit, seed=0):
    """Distinct ascending positions below ``limit``; -1 behind a random count."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(*shape[:-1], limit, generator=generator).argsort(-1)
    indices = draw[..., : shape[-1]].sort(-1).values.int()
    counts = torch.randint(0, shape[-1] + 1, shape[:-1], generator=generator).int()
    beyond = torch.arange(shape[-1]) >= counts.unsqueeze(-1)
    return indices.masked_fill(beyond, -1), counts


def masked_attention(q, k, v, seen, sink=None):
    """Attention in one expression; ``seen`` bool [B, Hq, Sq, Sk], every row sees something."""
    group = q.shape[1] // k.shape[1]
    k, v = (torch.stack([x[:, h // group] for h in range(q.shape[1])], 1).double() for x in (k, v))
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~seen, -INF)
    if sink is not None:
        extra = sink.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[2]]
    return weights @ v, torch.logsumexp(scores, -1)


# ---- decode


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("heads", HEADS)
def test_everything_is_dense_attention(heads, rows):
    q, k, v = problem(heads, rows)
    sink = randn((heads[0],), seed=9)
    expected = reference.block_sparse_attention(q, k, v, causal=True, sink=sink, return_lse=True)
    assert_bitwise(oracle.decode(q, k, v, sink=sink, return_lse=True), expected)
    seen = reference.visible_mask(rows, 45, causal=True).expand(2, heads[0], -1, -1)
    for got, want in zip(expected, masked_attention(q, k, v, seen, sink), strict=True):
        close(got, want)


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_pages_equal_a_contiguous_cache_and_unused_memory_is_poison(page_size):
    q, k, v = problem(rows=3, length=70)
    lengths = [70, 33]
    index = TokenIndex(*random_lists((2, 2, 20), 33))
    for own in (None, index):
        cut = dict(seq_lens=torch.tensor(lengths).int())
        expected = oracle.decode(q, k, v, own, **cut, return_lse=True)
        cache_k, cache_v, where = paged(k, v, lengths, page_size)
        assert_bitwise(oracle.decode(q, cache_k, cache_v, own, **where, return_lse=True), expected)


@pytest.mark.parametrize("lists", ["one", "kv", "q"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("per_row", [False, True])
def test_listed_tokens_are_a_mask(heads, lists, per_row):
    q, k, v = problem(heads, rows=2)
    num_lists = {"one": 1, "kv": heads[1], "q": heads[0]}[lists]
    shape = (2, 2, num_lists, 12) if per_row else (2, num_lists, 12)
    indices, counts = random_lists(shape, 44)
    indices[..., 0] = 0  # every row sees something
    counts.clamp_(min=1)
    seen = torch.zeros(2, heads[0], 2, 45, dtype=torch.bool)
    for b, h, i in itertools.product(range(2), range(heads[0]), range(2)):
        where = (b, i, h * num_lists // heads[0]) if per_row else (b, h * num_lists // heads[0])
        seen[b, h, i, indices[where][: counts[where]].long()] = True
    seen &= reference.visible_mask(2, 45, causal=True)
    got = oracle.decode(q, k, v, TokenIndex(indices, counts), return_lse=True)
    for x, y in zip(got, masked_attention(q, k, v, seen), strict=True):
        close(x, y)


def test_query_heads_read_their_kv_head_by_division():
    """One key per KV head carries the head's number in its value."""
    v = torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 5, 8)
    q, k, _ = problem((6, 3), length=5, batch=1)
    out = oracle.decode(q, k, v)
    assert out[0, :, 0, 0].round().tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("index_page", [4, 16, 24])
def test_page_lists_equal_their_tokens(index_page):
    q, k, v = problem(rows=2, length=70)
    lengths = [70, 41]
    pages, counts = random_lists((2, 2, 2), 41 // index_page + 1)
    tokens = torch.full((2, 2, 2 * index_page), -1, dtype=torch.int32)
    for b, h in itertools.product(range(2), range(2)):
        for slot, page in enumerate(pages[b, h, : counts[b, h]].tolist()):
            span = range(page * index_page, min((page + 1) * index_page, lengths[b]))
            first = slot * index_page
            tokens[b, h, first : first + len(span)] = torch.tensor(list(span))
    cut = dict(seq_lens=torch.tensor(lengths).int(), return_lse=True)
    got = oracle.decode(q, k, v, TokenIndex(pages, counts, index_page), **cut)
    assert_bitwise(got, oracle.decode(q, k, v, TokenIndex(tokens), **cut))


def test_bad_entries_pages_and_lengths_are_skipped():
    q, k, v = problem(batch=1)
    good = torch.tensor([[[3, 7, 20]]], dtype=torch.int32)
    expected = oracle.decode(q, k, v, TokenIndex(good), return_lse=True)
    bad = torch.tensor([[[-1, 3, *BAD_IDS[:2], 7, *BAD_IDS[3:], 45, 20, 9]]], dtype=torch.int32)
    counts = torch.tensor([[bad.shape[-1] - 1]], dtype=torch.int32)
    assert_bitwise(oracle.decode(q, k, v, TokenIndex(bad, counts), return_lse=True), expected)
    everything = oracle.decode(q, k, v, return_lse=True)
    for length in (45, 1000, 2**31 - 1):
        lens = torch.tensor([length], dtype=torch.int32)
        assert_bitwise(oracle.decode(q, k, v, seq_lens=lens, return_lse=True), everything)
        if length > 45:
            with pytest.raises(ValueError, match=r"seq_lens\[0\]"):
                oracle.decode(q, k, v, seq_lens=lens, validate=True)
    with pytest.raises(ValueError, match=r"indices\[0, 0, 2\] = -2147483648"):
        oracle.decode(q, k, v, TokenIndex(bad, counts), validate=True)
    cache_k, cache_v, where = paged(k, v, [45], 16)
    where["block_table"][0, 1] = 99  # keys 16..31 are masked
    rest = TokenIndex(torch.tensor([[[*range(16), *range(32, 45)]]], dtype=torch.int32))
    got = oracle.decode(q, cache_k, cache_v, **where, return_lse=True)
    assert_bitwise(got, oracle.decode(q, k, v, rest, return_lse=True))


@pytest.mark.parametrize("with_sink", [False, True])
def test_rows_without_keys(with_sink):
    q, k, v = problem(rows=3)
    sink = randn((4,), seed=3) if with_sink else None
    empty = torch.full((4,), -INF).double() if sink is None else sink.double()
    lens = torch.tensor([0, 2], dtype=torch.int32)
    out, lse = oracle.decode(q, k, v, seq_lens=lens, sink=sink, return_lse=True)
    assert (out[0] == 0).all() and (out[1, :, 0] == 0).all()
    close(lse[0], empty[:, None].expand(4, 3))
    close(lse[1, :, 0], empty)
    assert (out[1, :, 1:] != 0).any() and lse.isnan().sum() == 0
    nothing = TokenIndex(torch.full((2, 1, 4), -1, dtype=torch.int32))
    assert (oracle.decode(q, k, v, nothing, sink=sink) == 0).all()


@pytest.mark.parametrize("page", [1, 8])
def test_dense_range_is_a_union_without_doubles(page):
    q, k, v = problem(rows=2)
    lists, counts = random_lists((2, 4, 4), 45 // page)
    begin = torch.tensor([30, 60], dtype=torch.int32)
    seen = torch.zeros(2, 4, 2, 45, dtype=torch.bool)
    for b, h in itertools.product(range(2), range(4)):
        for entry in lists[b, h, : counts[b, h]].tolist():
            seen[b, h, :, entry * page : (entry + 1) * page] = True
        seen[b, h, :, min(int(begin[b]), 45 - 3) :] = True
    seen &= reference.visible_mask(2, 45, causal=True)
    index = TokenIndex(lists, counts, page)
    got = oracle.decode(q, k, v, index, dense_begin=begin, recent=3, return_lse=True)
    for x, y in zip(got, masked_attention(q, k, v, seen), strict=True):
        close(x, y)


def test_physical_slots_equal_positions_through_the_table():
    q, k, v = problem(length=40)
    cache_k, cache_v, where = paged(k, v, [40, 25], 8)
    scores = randn((2, 2, 40), seed=5)
    options = dict(seq_lens=where["seq_lens"], sink=1, recent=2)
    logical = oracle.select_topk(scores, 9, **options)
    transform = dict(block_table=where["block_table"], table_page_size=8, num_pages=len(cache_k))
    slots = oracle.select_topk(scores, 9, **options, **transform)
    assert slots.physical and not torch.equal(slots.indices, logical.indices)
    got = oracle.decode(q, cache_k, cache_v, slots, **where, return_lse=True)
    for x, y in zip(got, oracle.decode(q, k, v, logical, return_lse=True), strict=True):
        close(x, y)


def test_fp8_codes_are_scaled_per_head():
    q, k, v = problem()
    scale = torch.tensor([0.5, 2.0])
    codes = [x.to(torch.float8_e4m3fn) for x in (k, v)]
    plain = [c.float() * scale[None, :, None, None] for c in codes]
    close(oracle.decode(q, *codes, k_scale=scale, v_scale=scale), oracle.decode(q, *plain))


# ---- proxy_scores


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("seed", range(5))
def test_quest_bound_is_never_below_a_key_of_its_page(heads, seed):
    q, k, _ = problem(heads, length=50, seed=seed)
    bound = oracle.proxy_scores(q, page_bounds(k, 16), element="bounds", page_size=16)
    exact = oracle.proxy_scores(q, k, page_reduce="max", page_size=16)
    assert bound.shape == exact.shape == (2, 1, heads[0], 4)
    assert (bound >= exact - 1e-12).all()
    one_key = oracle.proxy_scores(q, page_bounds(k, 1), element="bounds", page_size=1)
    close(one_key, oracle.proxy_scores(q, k))


@pytest.mark.parametrize("proxy_heads", [1, 3, 6])
def test_dot_scores_are_scaled_products(proxy_heads):
    q = randn((2, 6, 3, 16))
    keys = randn((2, proxy_heads, 20, 16), seed=1)
    spread = torch.stack([keys[:, h // (6 // proxy_heads)] for h in range(6)], 1)
    expected = torch.einsum("bhrd,bhjd->brhj", q.double(), spread.double())
    close(oracle.proxy_scores(q, keys), expected / 4)
    close(oracle.proxy_scores(q, keys, score_scale=1.0), expected)
    scale = randn((2, proxy_heads, 20), seed=4).abs()
    scaled = oracle.proxy_scores(q, keys, key_scale=scale, score_scale=1.0)
    close(scaled, expected * scale.double().repeat_interleave(6 // proxy_heads, 1)[:, None])
    seen = reference.visible_mask(3, 20, causal=True)[None, :, None]
    close(
        oracle.proxy_scores(q, keys, causal=True), (expected / 4).masked_fill(~seen, -INF), "causal"
    )
    weights = randn((2, 6, 3), seed=2)
    indexer = oracle.proxy_scores(
        q, keys, element="relu_dot", head_weights=weights, head_reduce="sum", num_out_heads=1
    )
    close(indexer, torch.einsum("bhr,brhj->brj", weights.double(), expected.relu() / 4)[:, :, None])


@pytest.mark.parametrize("page_size", [1, 16])
def test_paged_proxies_equal_contiguous_ones(page_size):
    q, k, v = problem(length=50)
    lengths = [50, 17]
    cache, _, where = paged(k, v, lengths, page_size)
    cut = dict(seq_lens=where["seq_lens"], skip_first=2, skip_last=3)
    options = dict(row_reduce="mean", softmax=True, head_reduce="sum", num_out_heads=1)
    expected = oracle.proxy_scores(q, k, **cut, **options)
    got = oracle.proxy_scores(q, cache, block_table=where["block_table"], **cut, **options)
    assert_bitwise(got[..., :50], expected)
    assert (got[..., 50:] == -INF).all()
    finite = expected.isfinite().sum(-1).flatten().tolist()
    assert finite == [45, 12]
    close(expected.masked_fill(expected == -INF, 0).sum(-1), torch.full((2, 1), 4.0).double())


def test_reductions_in_order():
    q, k, _ = problem((4, 2), rows=3, length=22)
    dots = oracle.proxy_scores(q, k)
    for how, name in (("max", "amax"), ("mean", "mean"), ("sum", "sum")):
        rows = getattr(dots, name)(1)
        close(oracle.proxy_scores(q, k, row_reduce=how), rows)
        groups = getattr(rows.unflatten(1, (2, 2)), name)(2)
        reduced = dict(row_reduce=how, head_reduce=how, num_out_heads=2)
        close(oracle.proxy_scores(q, k, **reduced), groups)
        pages = torch.stack([getattr(x, name)(-1) for x in groups.split(8, -1)], -1)
        close(oracle.proxy_scores(q, k, page_reduce=how, page_size=8, **reduced), pages)
    mass = dict(softmax=True, head_reduce="max", num_out_heads=1, page_reduce="sum", page_size=8)
    expected = torch.softmax(dots, -1).amax(2)
    expected = torch.stack([x.sum(-1) for x in expected.split(8, -1)], -1)
    close(oracle.proxy_scores(q, k, **mass)[:, :, 0], expected)


def test_nan_keys_reach_their_own_scores_only():
    q, k, _ = problem(length=20)
    clean = oracle.proxy_scores(q, k, page_reduce="max", page_size=8)
    k[0, 1, 9] = NAN
    dirty = oracle.proxy_scores(q, k, page_reduce="max", page_size=8)
    assert torch.nonzero(dirty.isnan()).tolist() == [[0, 0, 2, 1], [0, 0, 3, 1]]
    assert_bitwise(dirty.masked_fill(dirty.isnan(), 0), clean.masked_fill(dirty.isnan(), 0))


# ---- append_kv


@pytest.mark.parametrize("page_size", [1, 8, 16])
def test_appended_steps_equal_the_whole_cache(page_size):
    """Rows appended in uneven steps, with a draft taken back: cache, bounds and proxy agree."""
    q, k, v = problem(length=40)
    k = k.bfloat16()
    projection = randn((2, 8, 4), seed=8)
    table = torch.randperm(2 * 41, generator=torch.Generator().manual_seed(1)).int().view(2, 41)
    table = table[:, : -(-40 // page_size)].contiguous()
    cache_k = torch.full((82, page_size, 2, 8), NAN, dtype=torch.bfloat16)
    cache_v = torch.full((82, page_size, 2, 8), NAN)
    bounds = torch.full((82, 2, 2, 8), NAN, dtype=torch.bfloat16)
    proxy = torch.full((82, page_size, 2, 4), NAN)
    side = dict(block_table=table, bounds=bounds, projection=projection, proxy=proxy)

    def append(begin, end, k, v):
        lens = torch.tensor([end, end], dtype=torch.int32)
        oracle.append_kv(
            k[:, :, begin:end], v[:, :, begin:end], cache_k, cache_v, seq_lens=lens, **side
        )

    append(0, 17, k, v)
    append(17, 18, k, v)
    append(18, 21, torch.full_like(k, NAN), torch.full_like(v, NAN))  # a draft, rejected
    append(18, 25, k, v)
    append(25, 40, k, v)
    lens = torch.tensor([40, 40], dtype=torch.int32)
    where = dict(block_table=table, seq_lens=lens)
    assert_bitwise(oracle.decode(q, cache_k, cache_v, **where), oracle.decode(q, k, v))
    got = oracle.proxy_scores(q, bounds, element="bounds", page_size=page_size, **where)
    whole = oracle.proxy_scores(q, page_bounds(k, page_size), element="bounds", page_size=page_size)
    assert_bitwise(got, whole)
    rows = torch.einsum("bhjd,hdr->bhjr", k.double(), projection.double()).float()
    short = q[..., :4]
    got = oracle.proxy_scores(short, proxy, **where)[..., :40]
    close(got, oracle.proxy_scores(short, rows))


def test_append_leaves_everything_else_alone():
    k, v = randn((2, 2, 3, 8)), randn((2, 2, 3, 8), seed=1)
    for lengths, table in (([1, 16], [[3, -1], [2, 9]]), ([-5, 2**31 - 1], [[3, 1], [2, 0]])):
        caches = torch.zeros(4, 8, 2, 8), torch.zeros(4, 8, 2, 8)
        where = dict(block_table=torch.tensor(table).int(), seq_lens=torch.tensor(lengths).int())
        oracle.append_kv(k, v, *caches, **where)
        written = torch.nonzero((caches[0] != 0).any(-1).any(-1)).tolist()
        assert written == ([[3, 0]] if lengths[0] == 1 else [])
        if written:  # lengths are those after the append: the last of three rows is position 0
            assert_bitwise(caches[0][3, 0], k[0, :, 2])


def test_append_contiguous_packed_and_fp8():
    k, v = randn((2, 2, 4, 8)) * 300, randn((2, 2, 4, 8), seed=1)
    scale = torch.tensor([0.5, 4.0])
    k[0, 0, 0, 0] = NAN
    caches = [torch.zeros(2, 2, 10, 8, dtype=torch.float8_e4m3fn) for _ in range(2)]
    bounds = torch.zeros(2, 2, 2, 2, 8)
    packed = [torch.cat([x[0].transpose(0, 1), x[1, :, 1:].transpose(0, 1)]) for x in (k, v)]
    options = dict(k_scale=scale, v_scale=scale, bounds=bounds, page_size=8)
    lens, cu = torch.tensor([7, 10]).int(), torch.tensor([0, 4, 7]).int()
    oracle.append_kv(*packed, *caches, seq_lens=lens, cu_seqlens=cu, **options)
    stored = caches[0].float()
    wanted = (k / scale[None, :, None, None]).clamp(-448, 448)
    assert stored[0, 0, 3, 0].isnan() and (stored[1, :, :7] == 0).all()
    expected = wanted.to(torch.float8_e4m3fn).float()
    assert_bitwise(stored[0, :, 3:7], expected[0])
    assert_bitwise(stored[1, :, 7:], expected[1, :, 1:])
    assert_bitwise(bounds[1], page_bounds(stored[1:], 8)[0])
    assert_bitwise(bounds[0, 0, :, 1], stored[0, :, :7].amax(1))
