"""What a scorer must promise: bounds, masses, pages, isolation, errors."""

import math

import pytest
import torch

import attnsieve
from attnsieve import reference_decode
from cache_ops import PATHS, CacheOps
from cases import BAD_IDS, randn
from layouts import deal_pages, fill_pages, page_bounds
from numerics import assert_bitwise

NAN, INF = math.nan, math.inf


@pytest.fixture
def op(device):
    return CacheOps(device)


@pytest.mark.parametrize("page_size", [1, 16, 50])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1), (12, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_quest_bound_is_never_below_a_key_of_its_page(op, heads, page_size, seed):
    q, k = randn((2, heads[0], 2, 64), seed=seed), randn((2, heads[1], 130, 64), seed=seed + 9)
    options = dict(page_size=page_size, score_scale=1.0)
    bound = op.proxy_scores(q, page_bounds(k, page_size), element="bounds", **options)
    exact = op.proxy_scores(q, k, page_reduce="max", **options)
    assert bound.shape == exact.shape == (2, 2, heads[0], -(-130 // page_size))
    assert (bound >= exact - 1e-4).all()
    if page_size == 1:
        torch.testing.assert_close(bound, exact, rtol=1e-5, atol=1e-4)
    else:
        assert (bound > exact + 1).float().mean() > 0.9


@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_lightning_indexer(op, key_heads):
    """I(t, s) = sum_h w_h(t) ReLU(q_h(t) . k(s)), DeepSeek-V3.2; GQA by division."""
    q, k = randn((2, 6, 3, 16)), randn((2, key_heads, 90, 16), seed=1)
    weights = randn((2, 6, 3), seed=2)
    spread = torch.stack([k[:, h // (6 // key_heads)] for h in range(6)], 1)
    dots = torch.einsum("bhtd,bhsd->bhts", q, spread).relu()
    options = dict(element="relu_dot", score_scale=1.0, head_reduce="sum", num_out_heads=1)
    got = op.proxy_scores(q, k, head_weights=weights, **options)
    torch.testing.assert_close(got[:, :, 0], torch.einsum("bht,bhts->bts", weights, dots))


def test_query_heads_read_their_key_head_by_division(op):
    k = torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 5, 8).contiguous()
    scores = op.proxy_scores(torch.ones(1, 6, 1, 8), k, score_scale=0.125)
    assert scores[0, 0, :, 0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("rows", [1, 3])
def test_softmax_mass(op, rows):
    """A page's summed mass is the share of attention that falls on it, and a row's adds up to 1."""
    q, k = randn((2, 8, rows, 64)), randn((2, 2, 700, 64), seed=1)
    options = dict(softmax=True, causal=True, head_reduce="sum", num_out_heads=2)
    mass = op.proxy_scores(q, k, page_reduce="sum", page_size=16, **options)
    total = mass.masked_fill(mass == -INF, 0).sum(-1)
    torch.testing.assert_close(total, torch.full((2, rows, 2), 4.0))
    _, lse = attnsieve.decode(q, k, k, return_lse=True)
    dots = op.proxy_scores(q, k, causal=True)
    weights = (dots - lse.transpose(1, 2).unsqueeze(-1)).exp().unflatten(2, (2, 4)).sum(3)
    pages = torch.stack([x.sum(-1) for x in weights.split(16, -1)], -1)
    torch.testing.assert_close(mass.masked_fill(mass == -INF, 0), pages, rtol=1e-5, atol=1e-6)


OPTIONS = (
    dict(),
    dict(row_reduce="max", head_reduce="max", num_out_heads=2),
    dict(softmax=True, head_reduce="sum", num_out_heads=1, page_reduce="mean", page_size=12),
    dict(row_reduce="mean", softmax=True, page_reduce="max", page_size=7, causal=True),
)


@pytest.mark.parametrize("rows, dtype", PATHS)
@pytest.mark.parametrize("options", OPTIONS)
def test_pages_equal_a_contiguous_cache(op, options, rows, dtype):
    q, k = randn((2, 8, rows, 64), dtype), randn((2, 2, 2500, 64), dtype, seed=1)
    lengths, cut = [2500, 777], dict(skip_first=3, skip_last=20)
    cut["seq_lens"] = torch.tensor(lengths, dtype=torch.int32)
    want = op.proxy_scores(q, k, **cut, **options)
    for page_size in (1, 16, 100):
        table = deal_pages(lengths, -(-2500 // page_size) + 1, page_size)
        cache = fill_pages(k, lengths, table, page_size)  # NaN where nothing is
        got = op.proxy_scores(q, cache, block_table=table, **cut, **options)
        assert_bitwise(got[..., : want.shape[-1]], want)
        assert (got[..., want.shape[-1] :] == -INF).all()


@pytest.mark.parametrize("rows, dtype", PATHS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bounds_in_pages_equal_contiguous_ones(op, head_dim, rows, dtype):
    q, k = (randn((2, h, n, head_dim), dtype, seed=h) for h, n in ((8, rows), (2, 999)))
    bounds, lengths = page_bounds(k, 16), [999, 333]
    options = dict(element="bounds", page_size=16)
    options["seq_lens"] = torch.tensor(lengths, dtype=torch.int32)
    table = deal_pages(lengths, 63, 16)
    cache = torch.full((table.numel() + 2, 2, 2, head_dim), NAN, dtype=dtype)
    for b, length in enumerate(lengths):
        for slot in range(-(-length // 16)):
            cache[int(table[b, slot])] = bounds[b, slot]
    for heads in (dict(), dict(head_reduce="max", num_out_heads=2), dict(skip_last=1)):
        want = op.proxy_scores(q, bounds, **options, **heads)
        got = op.proxy_scores(q, cache, block_table=table, **options, **heads)
        assert_bitwise(got, want)
        assert (want[1, ..., 21:] == -INF).all() and want[1, ..., :20].isfinite().all()


@pytest.mark.parametrize("rows, dtype", PATHS)
@pytest.mark.parametrize("options", OPTIONS)
def test_results_depend_on_neither_neighbours_nor_threads(op, options, rows, dtype):
    q, k = randn((3, 8, rows, 64), dtype), randn((3, 2, 2500, 64), dtype, seed=1)
    lens = torch.tensor([2500, 0, 1300], dtype=torch.int32)
    expected = op.proxy_scores(q, k, seq_lens=lens, **options)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_bitwise(op.proxy_scores(q, k, seq_lens=lens, **options), expected)
    for b in range(3):
        one = slice(b, b + 1)
        got = op.proxy_scores(q[one], k[one], seq_lens=lens[one], **options)
        assert_bitwise(got, expected[one])


@pytest.mark.parametrize("rows, dtype", PATHS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_what_is_no_candidate_never_matters(op, value, rows, dtype):
    q, k = randn((2, 4, rows, 64), dtype), randn((2, 2, 300, 64), dtype, seed=1)
    lens = torch.tensor([300, 100], dtype=torch.int32)
    for options in OPTIONS:
        options = dict(options, seq_lens=lens, skip_first=4, skip_last=9)
        dirty = k.clone()
        dirty[:, :, :4], dirty[0, :, 291:], dirty[1, :, 91:] = value, value, value
        want = op.proxy_scores(q, k, **options)
        assert_bitwise(op.proxy_scores(q, dirty, **options), want)
        assert not want.isnan().any()


def test_nan_reaches_its_own_scores_only(op):
    q, k = randn((2, 4, 2, 64)), randn((2, 2, 300, 64), seed=1)
    dirty = k.clone()
    dirty[0, 1, 70, 5] = NAN  # key head 1: query heads 2 and 3
    for how in ("max", "mean", "sum"):
        options = dict(row_reduce=how, page_reduce=how, page_size=16)
        clean = op.proxy_scores(q, k, **options)
        got = op.proxy_scores(q, dirty, **options)
        assert torch.nonzero(got.isnan()).tolist() == [[0, 2, 4], [0, 3, 4]]
        assert_bitwise(got.masked_fill(got.isnan(), 0), clean.masked_fill(got.isnan(), 0))
    relu = op.proxy_scores(q, dirty, element="relu_dot")
    assert torch.nonzero(relu.isnan())[:, [0, 2, 3]].unique(dim=0).tolist() == [
        [0, 2, 70],
        [0, 3, 70],
    ]
    mass = op.proxy_scores(q, dirty, softmax=True)
    assert mass[0, :, 2:].isnan().all() and mass.isnan().sum() == 2 * 2 * 300
    bound = op.proxy_scores(q, page_bounds(dirty, 16), element="bounds", page_size=16)
    assert torch.nonzero(bound.isnan())[:, [0, 2, 3]].unique(dim=0).tolist() == [
        [0, 2, 4],
        [0, 3, 4],
    ]
    q[1, 0, 1, 3] = NAN  # its own row alone
    got = op.proxy_scores(q, page_bounds(k, 16), element="bounds", page_size=16)
    assert got[1, 1, 0].isnan().all() and got.isnan().sum() == 19


@pytest.mark.parametrize("how", ["max", "mean", "sum"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (14, 2)])
def test_nan_of_a_decoding_step(op, heads, how):
    """One query row: NaN of a key or a query reaches every output head that reads it, no other."""
    num_heads, key_heads = heads
    q, k = (
        randn((2, h, n, 64), torch.bfloat16, seed=n) for h, n in ((num_heads, 1), (key_heads, 300))
    )
    k[0, -1, 70, 5] = NAN
    reduced = dict(head_reduce=how, num_out_heads=key_heads)
    whole = list(range(num_heads - num_heads // key_heads, num_heads))
    for options, hit in (({}, whole), (reduced, [key_heads - 1])):
        for element in ("dot", "relu_dot"):
            got = op.proxy_scores(q, k, element=element, **options)
            assert torch.nonzero(got.isnan()).tolist() == [[0, 0, h, 70] for h in hit]
        got = op.proxy_scores(q, page_bounds(k, 16), element="bounds", page_size=16, **options)
        assert torch.nonzero(got.isnan()).tolist() == [[0, 0, h, 4] for h in hit]
        spoiled = q.clone()
        spoiled[1, 0, 0, 63] = NAN
        got = op.proxy_scores(spoiled, page_bounds(k, 16), element="bounds", page_size=16)
        assert got[1, 0, 0].isnan().all() and got[1].isnan().sum() == 19


def test_bad_lengths_and_pages_are_memory_safe(op):
    q, k = randn((2, 4, 2, 64)), randn((12, 10, 2, 64), seed=1)
    table = torch.tensor([[0, *BAD_IDS], [*BAD_IDS, 11]], dtype=torch.int32)
    lens = torch.tensor([-7, 2**31 - 1], dtype=torch.int32)
    where = dict(block_table=table, seq_lens=lens)
    got = op.proxy_scores(q, k, **where)
    assert (got[0] == -INF).all() and (got[1, ..., :50] == -INF).all()
    want = reference_decode.proxy_scores(q, k, **where)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    bounds = page_bounds(k.transpose(1, 2), 10)[:, 0]
    got = op.proxy_scores(q, bounds, element="bounds", page_size=10, **where)
    assert torch.nonzero(got > -INF)[:, [0, 3]].unique(dim=0).tolist() == [[1, 5]]
    for keys, options in ((k, {}), (bounds, dict(element="bounds", page_size=10))):
        with pytest.raises(ValueError, match=r"seq_lens\[0\] = -7"):
            op.proxy_scores(q, keys, **where, **options, validate=True)
        lens = torch.tensor([10, 60], dtype=torch.int32)
        with pytest.raises(ValueError, match=r"block_table\[1, 0\]"):
            both = dict(where, seq_lens=lens, validate=True)
            op.proxy_scores(q, keys, **both, **options)
    lens = torch.tensor([3, 11], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"seq_lens\[1\] = 11 is outside \[0, 10\]"):
        op.proxy_scores(q, k[:2].transpose(1, 2), seq_lens=lens, validate=True)


def test_score_select_attend_over_pages(op):
    """Quest's step: bounds -> pages -> attention, as one would write it over the whole cache."""
    q, k, v = (randn((2, h, n, 64), seed=h) for h, n in ((8, 1), (2, 320), (2, 320)))
    lens = torch.tensor([320, 170], dtype=torch.int32)
    bounds = page_bounds(k, 16)
    options = dict(element="bounds", page_size=16, row_reduce="max")
    scores = op.proxy_scores(
        q, bounds, seq_lens=lens, head_reduce="max", num_out_heads=2, **options
    )
    index = attnsieve.select_topk(scores, 5, seq_lens=lens, page_size=16, recent=1)
    got = attnsieve.decode(q, k, v, index, seq_lens=lens)
    for b, length in enumerate(lens.tolist()):
        pages = -(-length // 16)
        for g in range(2):
            own = q[b, 4 * g : 4 * g + 4, 0]
            best = (own[:, None, None] * bounds[b, :pages, g]).amax(2).sum(-1).amax(0)
            chosen = [*best[:-1].topk(4).indices.tolist(), pages - 1]
            keys = [j for p in chosen for j in range(16 * p, min(16 * p + 16, length))]
            weights = torch.softmax(own @ k[b, g, keys].T / 8, -1)
            torch.testing.assert_close(got[b, 4 * g : 4 * g + 4, 0], weights @ v[b, g, keys])


def test_strides(op):
    q, k = randn((2, 3, 8, 64)).transpose(1, 2), randn((2, 90, 2, 64), seed=1).transpose(1, 2)
    scale = randn((2, 90, 2), seed=2).transpose(1, 2)
    got = op.proxy_scores(q, k, key_scale=scale, head_weights=q[..., 0])
    tight = [x.contiguous() for x in (q, k, scale, q[..., 0])]
    want = op.proxy_scores(*tight[:2], key_scale=tight[2], head_weights=tight[3])
    assert_bitwise(got, want)
    weights = torch.tensor([0.5]).expand(8)
    halves = op.proxy_scores(q, k, head_weights=weights)
    assert_bitwise(halves, op.proxy_scores(q, k) * 0.5)


PAGES = dict(keys=torch.zeros(3, 16, 2, 64))
BAD_CALLS = (
    ("q", dict(q=torch.zeros(2, 4, 64))),
    ("q", dict(q=torch.zeros(2, 3, 1, 64))),
    ("keys", dict(keys=torch.zeros(2, 2, 50, 32))),
    ("keys", dict(keys=torch.zeros(1, 2, 50, 64))),
    ("keys", dict(keys=torch.zeros(2, 2, 50, 64).half())),
    ("keys", dict(keys=torch.zeros(2, 50, 2, 64, 2)[..., 0].transpose(1, 2))),
    ("keys", dict(element="bounds", page_size=16)),
    ("key_scale", dict(keys=torch.zeros(2, 2, 50, 64).to(torch.int8))),
    ("key_scale", dict(key_scale=torch.zeros(2, 2, 50, 1))),
    ("key_scale", dict(key_scale=torch.zeros(2, 2, 51))),
    ("key_scale", dict(key_scale=torch.zeros(2, 2, 50).double())),
    ("seq_lens", dict(block_table=torch.zeros(2, 1).int(), **PAGES)),
    ("seq_lens", dict(seq_lens=torch.zeros(2).long())),
    (
        "block_table",
        dict(block_table=torch.zeros(1, 1).int(), seq_lens=torch.zeros(2).int(), **PAGES),
    ),
    ("element", dict(element="cosine")),
    ("row_reduce", dict(row_reduce="min")),
    ("head_reduce", dict(num_out_heads=2)),
    ("num_out_heads", dict(num_out_heads=3, head_reduce="sum")),
    ("num_out_heads", dict(num_out_heads=0, head_reduce="sum")),
    ("head_weights", dict(head_weights=torch.ones(2))),
    ("head_weights", dict(head_weights=torch.ones(2, 4, 2))),
    ("head_weights", dict(head_weights=torch.ones(4).half())),
    ("page_size", dict(page_size=16)),
    ("page_size", dict(page_reduce="max")),
    ("page_size", dict(page_reduce="max", page_size=0)),
    ("page_reduce", dict(page_reduce="max", page_size=4, element="bounds"))
    + (dict(keys=torch.zeros(2, 5, 2, 2, 64)),),
    ("skip_first", dict(skip_first=-1)),
    ("skip_last", dict(skip_last=2**31)),
    ("score_scale", dict(score_scale=0.0)),
    ("score_scale", dict(score_scale=INF)),
)


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_calls_name_the_argument(bad):
    name, *changes = bad
    arguments = dict(q=torch.zeros(2, 4, 1, 64), keys=torch.zeros(2, 2, 50, 64))
    for change in changes:
        arguments |= change
    with pytest.raises(ValueError, match=name):
        attnsieve.proxy_scores(**arguments)


def test_refusals_name_what_is_missing():
    q, k = torch.zeros(2, 4, 1, 64), torch.zeros(2, 2, 50, 64)
    with pytest.raises(NotImplementedError, match="head_dim 12.*multiple of 8"):
        attnsieve.proxy_scores(q[..., :12].contiguous(), k[..., :12].contiguous())
    with pytest.raises(NotImplementedError, match="keys.*Float8_e5m2.*supported"):
        attnsieve.proxy_scores(q, k.to(torch.float8_e5m2))
    with pytest.raises(NotImplementedError, match="q has dtype"):
        attnsieve.proxy_scores(q.double(), k.double())
    with pytest.raises(TypeError, match="keys"):
        attnsieve.proxy_scores(q, [1.0])
    with pytest.raises(NotImplementedError, match="no backward"):
        attnsieve.proxy_scores(q.requires_grad_(), k)


@pytest.mark.parametrize("shape", [(0, 4, 1, 64), (2, 4, 0, 64), (2, 4, 1, 64)])
def test_empty(op, shape):
    q, k = torch.zeros(shape), torch.zeros(shape[0], 2, 0, 64)
    assert op.proxy_scores(q, k).shape == (shape[0], shape[2], 4, 0)
    k = torch.zeros(shape[0], 2, 5, 64)
    reduced = op.proxy_scores(q, k, row_reduce="sum", page_reduce="max", page_size=2)
    assert reduced.shape == (shape[0], 4, 3)
    assert (reduced == (0 if shape[2] else -INF)).all()
    options = dict(seq_lens=torch.zeros(shape[0], dtype=torch.int32), softmax=True)
    assert (op.proxy_scores(q, k, **options) == -INF).all()
