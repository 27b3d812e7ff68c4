"""Decode over a given selection equals masked attention in float64."""

import math

import pytest
import torch

import attnsieve
from attnsieve import TokenIndex, reference_decode
from cases import BAD_IDS, DTYPES, decode_cases, device_of, randn
from layouts import deal_pages, fill_pages
from numerics import assert_attention_close, assert_bitwise, pytorch_same_dtype
from token_lists import OnDevice

NAN, INF = math.nan, math.inf
HEADS = ((1, 1), (8, 8), (8, 2), (6, 3), (7, 1), (16, 1))


def random_index(heads, lists, rows, limit, page_size, k, seed=0):
    """Distinct ascending entries for 2 sequences; counts 0 .. k, garbage behind them."""
    num_lists = {"one": 1, "kv": heads[1], "q": heads[0]}[lists]
    generator = torch.Generator().manual_seed(seed)
    shape = (2, num_lists) if rows is None else (2, rows, num_lists)
    entries = -(-limit // page_size)
    draw = torch.rand(*shape, max(entries, k), generator=generator).argsort(-1)[..., :k]
    indices = draw.sort(-1).values.int()
    counts = torch.randint(0, k + 1, shape, generator=generator).int()
    beyond = torch.arange(k) >= counts.unsqueeze(-1)
    return TokenIndex(indices.masked_fill(beyond, BAD_IDS[seed % 5]), counts, page_size)


def seen_keys(index, heads, rows, lengths, capacity, causal, begins):
    """bool [B, Hq, Sq, capacity], written out."""
    seen = torch.zeros(len(lengths), heads[0], rows, capacity, dtype=torch.bool)
    for b, length in enumerate(lengths):
        for h in range(heads[0]):
            for i in range(rows):
                if index is None:
                    seen[b, h, i] = True
                else:
                    where = (b, i) if index.per_row else (b,)
                    where = (*where, h * index.num_lists // heads[0])
                    for entry in index.indices[where][: int(index.counts[where])].tolist():
                        first = entry * index.page_size
                        seen[b, h, i, first : first + index.page_size] = True
                    seen[b, h, i, begins[b] :] = True
                last = length - rows + i if causal else length - 1
                seen[b, h, i, max(min(last + 1, length), 0) :] = False
    return seen


@pytest.fixture
def op(device):
    """decode on a device, operands and results on the CPU; `dtype` is the finest it takes there."""
    functions = OnDevice(attnsieve, device)
    functions.dtype = DTYPES[device][0]
    return functions


def assert_close(got, want):
    """Two ways to the same result, which add in different orders."""
    for x, y in zip(got, want, strict=True):
        bound = 2e-6 if x.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(x.double(), y.double(), rtol=bound, atol=bound)


FACTORS = dict(
    heads=HEADS,
    rows=(1, 2, 5, 8),
    lengths=((1, 0), (17, 64), (129, 3), (700, 333), (1500, 9)),
    cache=(None, 1, 16, 48, 128),
    index=(None, ("one", 1), ("kv", 1), ("q", 1), ("q", 16), ("one", 24), ("kv", 64)),
    per_row=(False, True),
    k=(1, 40, 130),
    dense=(None, "recent", "begin", "both"),
    sink=(False, True),
    causal=(True, False),
    float8=(False, True),
    num_splits=(0, 1, 3, 128),
)


CASES = decode_cases(FACTORS)
PLAIN = dict(per_row=False, dense=None, sink=False, causal=True, float8=False, num_splits=0)


def build(pick, seed=0):
    """Arguments, options, and what pytorch_same_dtype takes."""
    heads, rows, lengths = pick["heads"], pick["rows"], pick["lengths"]
    capacity = max(*lengths, 1) + 5
    dtype, dim = pick["dtype"], pick["head_dim"]
    q = randn((2, heads[0], rows, dim), dtype, seed=seed)
    k, v = (randn((2, heads[1], capacity, dim), dtype, seed=seed + s) for s in (1, 2))
    options = dict(causal=pick["causal"], num_splits=pick["num_splits"])
    numbers = k, v
    if pick["float8"]:
        scales = [torch.linspace(0.5, 1.5, heads[1]), torch.linspace(2, 0.25, heads[1])]
        options |= dict(zip(("k_scale", "v_scale"), scales, strict=True))
        k, v = (x.to(torch.float8_e4m3fn) for x in (k, v))
        numbers = [
            (x.float() * s[:, None, None]).to(dtype) for x, s in zip((k, v), scales, strict=True)
        ]
    index, begins = None, [capacity] * 2
    if pick["index"] is not None:
        lists, page_size = pick["index"]
        own_rows = rows if pick["per_row"] else None
        index = random_index(heads, lists, own_rows, max(lengths), page_size, pick["k"], seed)
        if pick["dense"] in ("recent", "both"):
            options["recent"] = 9
            begins = [max(n - 9, 0) for n in lengths]
        if pick["dense"] in ("begin", "both"):
            options["dense_begin"] = torch.tensor([lengths[0] // 2, -4], dtype=torch.int32)
            begins = [min(begins[0], lengths[0] // 2), 0]
    if pick["sink"]:
        options["sink"] = randn((heads[0],), seed=seed + 3)
    seen = seen_keys(index, heads, rows, lengths, capacity, pick["causal"], begins)
    options["seq_lens"] = torch.tensor(lengths, dtype=torch.int32)
    poisoned = []
    for x in (k, v):
        bits = x.clone().view(torch.uint8) if pick["float8"] else x.clone()
        for b, length in enumerate(lengths):
            bits[b, :, length:] = 0x7F if pick["float8"] else NAN
        poisoned.append(bits)
    if pick["cache"] is not None:
        table = deal_pages(lengths, -(-capacity // pick["cache"]), pick["cache"], seed)
        fill = 0x7F if pick["float8"] else NAN
        poisoned = [fill_pages(x, lengths, table, pick["cache"], fill) for x in poisoned]
        options["block_table"] = table
    caches = [x.view(k.dtype) for x in poisoned]
    return (q, *caches, index), options, (q, *numbers, seen)


@pytest.mark.parametrize("device, pick", CASES)
def test_decode_equals_masked_attention(device, pick):
    arguments, options, (q, k, v, seen) = build(pick)
    got = OnDevice(attnsieve, device_of(device)).decode(*arguments, **options, return_lse=True)
    ref = reference_decode.decode(*arguments, **options, return_lse=True)
    pt = pytorch_same_dtype(q, k, v, seen.long(), sink=options.get("sink"))
    assert_attention_close(*got, ref, pt, str(pick))
    assert got[0].dtype == q.dtype


@pytest.mark.parametrize("rows", [1, 4])
def test_everything_equals_the_prefill_op(op, rows):
    sizes = ((8, rows), (2, 300), (2, 300))
    q, k, v = (randn((2, h, n, 64), op.dtype, seed=h) for h, n in sizes)
    got = op.decode(q, k, v, return_lse=True)
    assert_close(got, op.block_sparse_attention(q, k, v, causal=True, return_lse=True))


def test_all_tokens_listed_is_everything_for_each_hidx(op):
    sizes = ((8, 2), (2, 100), (2, 100))
    q, k, v = (randn((2, h, n, 64), op.dtype, seed=h) for h, n in sizes)
    dense = op.decode(q, k, v, return_lse=True)
    for lists in (1, 2, 8):
        every = torch.arange(100, dtype=torch.int32).expand(2, lists, 100)
        pages = torch.arange(7, dtype=torch.int32).expand(2, lists, 7)
        for index in (TokenIndex(every), TokenIndex(pages, page_size=16)):
            assert_close(op.decode(q, k, v, index, return_lse=True), dense)


@pytest.mark.parametrize("capacity", [1024, 6000])
def test_splits_merge_to_the_whole(op, capacity):
    """However a sequence is cut: 1 to 128 parts, ragged ones and more than it has keys."""
    q, k, v = (
        randn((2, h, n, 128), op.dtype, seed=h) for h, n in ((6, 1), (2, capacity), (2, capacity))
    )
    lens = torch.tensor([capacity, 37], dtype=torch.int32)
    whole = op.decode(q, k, v, seq_lens=lens, num_splits=1, return_lse=True)
    for num_splits in (0, 2, 3, 7, 128):
        got = op.decode(q, k, v, seq_lens=lens, num_splits=num_splits, return_lse=True)
        assert_close(got, whole)


@pytest.mark.parametrize("k_tokens", [None, 300])
@pytest.mark.parametrize("heads, dim", [(8, 64), (16, 128), (32, 128)])
def test_the_size_of_the_batch_does_not_matter(op, heads, dim, k_tokens):
    """On a GPU it decides which parts of a sequence one CTA merges, and how large clusters are."""
    batch, length = 48, 4096
    q = randn((batch, heads, 1, dim), op.dtype)
    k, v = (randn((batch, 2, length, dim), op.dtype, seed=s) for s in (1, 2))
    lengths = [length if b % 3 else (b * 977) % length for b in range(batch)]
    lens = torch.tensor(lengths, dtype=torch.int32)
    index = None
    if k_tokens is not None:
        index = TokenIndex((torch.arange(k_tokens, dtype=torch.int32) * 11).expand(batch, 2, -1))
    got = op.decode(q, k, v, index, seq_lens=lens, return_lse=True)
    for b in (0, 1, 9, 24, 47):
        one = slice(b, b + 1)
        own = None if index is None else TokenIndex(index.indices[one])
        where = dict(seq_lens=lens[one], return_lse=True)
        want = reference_decode.decode(q[one], k[one], v[one], own, **where)
        assert_close([x[one] for x in got], want)
        alone = op.decode(q[one], k[one], v[one], own, **where)
        assert_bitwise(tuple(x[one] for x in got), alone)


def test_slots_equal_positions(op):
    pick = PLAIN | dict(cache=16, index=None, lengths=(129, 64), rows=1, heads=(8, 2), head_dim=64)
    (q, k, v, _), options, _ = build(pick | dict(dtype=torch.bfloat16))
    scores = randn((2, 2, 130), seed=7)
    chosen = dict(seq_lens=options["seq_lens"], recent=3)
    table = dict(block_table=options["block_table"], table_page_size=16, num_pages=len(k))
    logical = attnsieve.select_topk(scores, 20, **chosen)
    slots = attnsieve.select_topk(scores, 20, **chosen, **table)
    got = op.decode(q, k, v, slots, **options, return_lse=True)
    assert_bitwise(got, op.decode(q, k, v, logical, **options, return_lse=True))


def test_bad_entries_lengths_and_pages_are_memory_safe(op):
    q, k, v = (randn((2, h, n, 64), op.dtype, seed=h) for h, n in ((4, 1), (2, 50), (2, 50)))
    bad = torch.tensor([[*BAD_IDS, 50, 3, -1, 9, 3]] * 2, dtype=torch.int32)[:, None]
    for counts in (None, torch.full((2, 1), 2**31 - 1, dtype=torch.int32)):
        index = TokenIndex(bad, counts)
        got = op.decode(q, k, v, index, return_lse=True)
        assert_close(got, reference_decode.decode(q, k, v, index, return_lse=True))
    assert (op.decode(q, k, v, TokenIndex(bad, -counts)) == 0).all()
    wide = TokenIndex(bad, page_size=2**24)
    assert_close([op.decode(q, k, v, wide)], [reference_decode.decode(q, k, v, wide)])
    table = torch.tensor([[0, *BAD_IDS], [*BAD_IDS, 1]], dtype=torch.int32)
    pages = [x.reshape(10, 10, 2, 64) for x in (k, v)]
    lens = torch.tensor([-7, 2**31 - 1], dtype=torch.int32)
    options = dict(block_table=table, seq_lens=lens)
    out, lse = op.decode(q, *pages, **options, return_lse=True)
    assert (out[0] == 0).all() and (lse[0] == -INF).all()
    assert_close([out], [reference_decode.decode(q, *pages, **options)])
    with pytest.raises(ValueError, match=r"seq_lens\[0\] = -7"):
        op.decode(q, *pages, **options, validate=True)
    with pytest.raises(ValueError, match=r"indices\[0, 0, 0\]"):
        op.decode(q, k, v, TokenIndex(bad), validate=True)


def test_empty_lists_are_not_everything(op):
    q, k, v = (randn((2, h, n, 64), op.dtype, seed=h) for h, n in ((4, 2), (2, 50), (2, 50)))
    index = TokenIndex(torch.empty(2, 1, 0, dtype=torch.int32))
    out, lse = op.decode(q, k, v, index, return_lse=True)
    assert (out == 0).all() and (lse == -INF).all()
    window = op.decode(q, k, v, index, recent=10)  # a sliding window
    begin = torch.full((2,), 40, dtype=torch.int32)
    assert_bitwise(window, op.decode(q, k, v, index, dense_begin=begin))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("where", ["k", "v"])
def test_bad_numbers_reach_only_rows_that_attend_to_them(op, where, value):
    q, k, v = (randn((2, h, n, 64), op.dtype, seed=h) for h, n in ((4, 3), (2, 70), (2, 70)))
    clean = op.decode(q, k, v)
    {"k": k, "v": v}[where][1, 0, 69, 5] = value  # the last new row's own key
    dirty = op.decode(q, k, v)
    touched = torch.zeros_like(clean, dtype=torch.bool)
    touched[1, :2, 2] = True
    assert_bitwise(dirty[~touched], clean[~touched])
    assert not dirty[1, :2, 2, 5].isfinite().any() or where == "k"
    index = TokenIndex(torch.tensor([0, 4, 68], dtype=torch.int32).expand(2, 1, 3))
    assert op.decode(q, k, v, index).isfinite().all()


def test_a_bad_value_first_in_its_step(op):
    """Rows that do not see it still have their earlier keys rescaled for the step's new maximum."""
    q, k, v = (randn((1, h, n, 64), op.dtype, seed=h) for h, n in ((2, 2), (1, 70), (1, 70)))
    k[..., 68, :] = 3 * q[0, 0, 0]  # the maximum of row 0 rises in a late step
    order = torch.tensor([*range(64), 69, *range(64, 69)], dtype=torch.int32)
    index = TokenIndex(order.expand(1, 1, 70))
    clean = op.decode(q, k, v, index)
    v[..., 69, 3] = NAN
    dirty = op.decode(q, k, v, index)
    assert_close([dirty[:, :, 0]], [clean[:, :, 0]])
    assert dirty[:, :, 1, 3].isnan().all() and dirty.isnan().sum() == 2


@pytest.mark.parametrize("dense", [None, "recent"])
def test_results_depend_on_neither_neighbours_nor_threads(op, dense):
    pick = PLAIN | dict(cache=16, index=("kv", 1), lengths=(700, 333), rows=2, heads=(8, 2), k=300)
    pick |= dict(head_dim=64, dtype=torch.bfloat16, dense=dense)
    if dense is None:
        pick["index"] = None
    (q, k, v, index), options, _ = build(pick)
    expected = op.decode(q, k, v, index, **options, return_lse=True)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_bitwise(op.decode(q, k, v, index, **options, return_lse=True), expected)
    for b in range(2):
        one = slice(b, b + 1)
        own = {n: x[one] if n in ("seq_lens", "block_table") else x for n, x in options.items()}
        alone = None if index is None else TokenIndex(index.indices[one], index.counts[one])
        got = op.decode(q[one], k, v, alone, **own, return_lse=True)
        assert_bitwise(got, tuple(x[one] for x in expected))


def test_strides(op):
    q, k, v = (randn((2, n, h, 64), op.dtype, seed=h) for h, n in ((8, 2), (2, 90), (2, 90)))
    index = TokenIndex(torch.arange(0, 90, 3, dtype=torch.int32).expand(2, 2, 30))
    views = [x.transpose(1, 2) for x in (q, k, v)]
    got = op.decode(*views, index)
    assert got.stride() == views[0].stride()
    assert_bitwise(got, op.decode(*(x.contiguous() for x in views), index))


PAGES = dict(k_cache=torch.zeros(3, 16, 2, 64), v_cache=torch.zeros(3, 16, 2, 64))
FLOAT8 = {
    name: torch.zeros(2, 2, 50, 64).to(torch.float8_e4m3fn) for name in ("k_cache", "v_cache")
}
SCALES = dict(k_scale=torch.ones(2), v_scale=torch.ones(2))
BAD_CALLS = (
    ("q", dict(q=torch.zeros(2, 4, 9, 64))),
    ("q", dict(q=torch.zeros(2, 3, 1, 64))),
    ("k_cache", dict(k_cache=torch.zeros(2, 2, 50, 32))),
    ("k_cache", dict(k_cache=torch.zeros(2, 2, 50, 64).half())),
    ("v_cache", dict(v_cache=torch.zeros(2, 2, 51, 64))),
    ("seq_lens", dict(block_table=torch.zeros(2, 1).int(), **PAGES)),
    ("seq_lens", dict(seq_lens=torch.zeros(2).long())),
    ("index", dict(index=TokenIndex(torch.zeros(2, 3, 5).int()))),
    ("index", dict(index=TokenIndex(torch.zeros(1, 2, 5).int()))),
    ("index", dict(index=TokenIndex(torch.zeros(2, 2, 2, 5).int()))),
    ("index", dict(index=TokenIndex(torch.zeros(2, 2, 5).int(), physical=True))),
    ("dense_begin", dict(recent=3)),
    ("dense_begin", dict(dense_begin=torch.zeros(2).int())),
    ("recent", dict(recent=-1, index=TokenIndex(torch.zeros(2, 2, 5).int()))),
    ("sink", dict(sink=torch.zeros(2))),
    ("num_splits", dict(num_splits=129)),
    ("k_scale", dict(k_scale=torch.ones(2))),
    ("v_scale", dict(FLOAT8, k_scale=torch.ones(2))),
    ("k_scale", dict(FLOAT8, k_scale=torch.ones(3), v_scale=torch.ones(2))),
    ("v_cache", dict(FLOAT8, v_cache=torch.zeros(2, 2, 50, 64), **SCALES)),
    ("softmax_scale", dict(softmax_scale=0.0)),
)


@pytest.mark.parametrize("name, change", BAD_CALLS)
def test_bad_calls_name_the_argument(name, change):
    arguments = dict(
        q=torch.zeros(2, 4, 1, 64),
        k_cache=torch.zeros(2, 2, 50, 64),
        v_cache=torch.zeros(2, 2, 50, 64),
    )
    with pytest.raises(ValueError, match=name):
        attnsieve.decode(**(arguments | change))
    with pytest.raises(NotImplementedError, match="head_dim 12"):
        attnsieve.decode(*(x[..., :12].contiguous() for x in arguments.values()))


@pytest.mark.parametrize("shape", [(0, 4, 1, 64), (2, 4, 0, 64)])
def test_empty(shape):
    q, k = torch.zeros(shape), torch.zeros(shape[0], 2, 0, 64)
    out, lse = attnsieve.decode(q, k, k, return_lse=True)
    assert out.shape == shape and lse.shape == shape[:3]
    none = attnsieve.decode(
        torch.zeros(2, 4, 1, 64), torch.zeros(2, 2, 0, 64), torch.zeros(2, 2, 0, 64)
    )
    assert (none == 0).all()
