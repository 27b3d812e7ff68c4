"""proxy_scores with a projection: what is scored is q narrowed by a matrix."""

import math

import pytest
import torch

import attnsieve
from attnsieve import reference_decode
from cache_ops import CacheOps
from cases import DTYPES, pairwise, randn
from layouts import deal_pages, fill_pages
from numerics import assert_bitwise, assert_near_eager, rounding_noise

CASES = pairwise(
    dtype=DTYPES["cpu"],
    codes=(False, True),
    heads=((1, 1), (8, 8), (8, 2), (8, 4), (6, 3), (12, 4), (5, 1), (16, 2)),
    matrices=("key", "q", "one"),
    batched=(False, True),
    rows=(1, 3, 9),
    head_dim=(8, 24, 64, 128, 256),
    width=(8, 16, 24, 32, 40, 64, 128),
    capacity=(1, 90, 700, 3000),
    page=(None, 16),
    reduced=(False, True),
    how=("max", "mean", "sum"),
    element=("dot", "relu_dot"),
    softmax=(False, True),
)


@pytest.fixture
def op(device):
    return CacheOps(device)


def integers(shape, low, high, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).float()


def matrices_of(pick):
    query_heads, key_heads = pick["heads"]
    return {"key": key_heads, "q": query_heads, "one": 1}[pick["matrices"]]


def narrowed(q, projection):
    """``q @ projection`` in float64, head by head."""
    heads = projection.shape[-3]
    rows = []
    for b in range(q.shape[0]):
        own = projection[b] if projection.dim() == 4 else projection
        for h in range(q.shape[1]):
            rows.append(q[b, h].double() @ own[h // (q.shape[1] // heads)].double())
    return torch.stack(rows).unflatten(0, q.shape[:2])


def drawn(pick, exact):
    """q, projection and keys; ``exact``: of integers whose products every dtype holds."""
    query_heads, key_heads = pick["heads"]
    wide, width = pick["head_dim"], pick["width"]
    q_shape = 2, query_heads, pick["rows"], wide
    shape = (*((2,) if pick["batched"] else ()), matrices_of(pick), wide, width)
    if exact:
        q = integers(q_shape, -2, 2, 0)
        few = integers(shape, 0, 15, 1) == 0
        projection = torch.where(few, integers(shape, -2, 2, 2), 0.0)
    else:
        q, projection = randn(q_shape), randn(shape, seed=1)
    keys = randn((2, key_heads, pick["capacity"], width), seed=3)
    options = dict(
        element=pick["element"],
        seq_lens=torch.tensor([pick["capacity"], pick["capacity"] // 2], dtype=torch.int32),
        row_reduce=pick["how"] if pick["rows"] == 1 else None,
        softmax=pick["softmax"],
        causal=pick["rows"] > 1,
    )
    if pick["reduced"]:
        options |= dict(head_reduce=pick["how"], num_out_heads=key_heads)
    if pick["codes"]:
        keys = (keys * 30).clamp(-127, 127).to(torch.int8)
        options["key_scale"] = torch.full(keys.shape[:-1], 0.03)
    else:
        keys = keys.to(pick["dtype"])
    if pick["page"] is not None:
        used = options["seq_lens"].tolist()
        table = deal_pages(used, -(-pick["capacity"] // pick["page"]), pick["page"], 0)
        keys = fill_pages(keys.float(), used, table, pick["page"], 0).to(keys.dtype)
        if pick["codes"]:
            options["key_scale"] = torch.full(keys.shape[:-1], 0.03)
        options["block_table"] = table
    return q.to(pick["dtype"]), projection.to(pick["dtype"]), keys, options


@pytest.mark.parametrize("pick", CASES, ids=[str(i) for i in range(len(CASES))])
def test_exact_products_are_scored_as_if_they_were_given(op, pick):
    q, projection, keys, options = drawn(pick, exact=True)
    narrow = narrowed(q, projection)
    assert (narrow.to(pick["dtype"]).double() == narrow).all()
    got = op.proxy_scores(q, keys, projection=projection, **options)
    assert_bitwise(got, op.proxy_scores(narrow.to(pick["dtype"]), keys, **options))
    oracle = reference_decode.proxy_scores(narrow.to(pick["dtype"]), keys, **options)
    torch.testing.assert_close(
        got.double(), oracle, rtol=1e-4, atol=1e-4 * float(narrow.abs().max())
    )


@pytest.mark.parametrize("dtype", DTYPES["cpu"][1:])
@pytest.mark.parametrize("width, rows", [(32, 1), (32, 3), (64, 1), (128, 1)])
def test_what_is_scored_is_rounded_to_nearest(op, width, rows, dtype):
    """Sums that float32 holds and the dtype does not, in one launch and in two."""
    q = integers((2, 8, rows, 128), -40, 40, 0).to(dtype)
    projection = integers((2, 128, width), -40, 40, 1).to(dtype)
    keys = integers((2, 2, 300, width), -1, 1, 2).to(dtype)
    narrow = narrowed(q, projection)
    assert (narrow.to(dtype).double() != narrow).any()
    got = op.proxy_scores(q, keys, projection=projection)
    assert_bitwise(got, op.proxy_scores(narrow.to(dtype), keys))


@pytest.mark.parametrize("pick", CASES, ids=[str(i) for i in range(len(CASES))])
def test_scores_equal_the_oracle(op, pick):
    q, projection, keys, options = drawn(pick | dict(softmax=False), exact=False)
    got = op.proxy_scores(q, keys, projection=projection, **options)
    want = reference_decode.proxy_scores(q, keys, projection=projection, **options)
    narrow = narrowed(q, projection)
    eager = reference_decode.proxy_scores(narrow.float().to(q.dtype), keys, **options).float()
    # A product that lies between two numbers of the dtype may become either, before it meets keys
    # of at most `largest`.
    step = torch.finfo(q.dtype).eps * narrow.abs().amax()
    scale = options.get("key_scale", torch.ones(1)).max()
    largest = (keys.double() * scale).abs().max() * math.sqrt(pick["width"])
    heads = pick["heads"][0] // pick["heads"][1] if options.get("head_reduce") == "sum" else 1
    finite = want.masked_fill(~want.isfinite(), 0)
    floor = 4 * rounding_noise(finite, got.dtype) + float(step * largest * heads)
    assert_near_eager("scores", got, want, eager, floor, str(pick))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_nan_and_neighbours_stay_in_their_head(op, rows, dtype):
    q = randn((3, 8, rows, 64), dtype)
    projection, keys = randn((2, 64, 32), dtype, seed=1), randn((3, 2, 300, 32), dtype, seed=2)
    want = op.proxy_scores(q, keys, projection=projection)
    assert_bitwise(op.proxy_scores(q[1:2], keys[1:2], projection=projection), want[1:2])
    q[1, 5, 0, 7] = math.nan
    got = op.proxy_scores(q, keys, projection=projection)
    assert got[1, 0, 5].isnan().all()
    others = torch.ones_like(got, dtype=torch.bool)
    others[1, 0, 5] = False
    assert_bitwise(got[others], want[others])


def test_strides(op):
    q = randn((2, 3, 8, 64)).transpose(1, 2)
    projection = randn((64, 2, 32), seed=1).transpose(0, 1)
    keys = randn((2, 2, 90, 32), seed=2)
    got = op.proxy_scores(q, keys, projection=projection)
    assert_bitwise(got, op.proxy_scores(q.contiguous(), keys, projection=projection.contiguous()))
    torch.testing.assert_close(
        got.double(),
        reference_decode.proxy_scores(q, keys, projection=projection),
        rtol=1e-4,
        atol=1e-4,
    )


BAD_CALLS = (
    ("projection", dict(projection=torch.zeros(64, 16))),
    ("projection", dict(projection=torch.zeros(3, 64, 16))),
    ("projection", dict(projection=torch.zeros(0, 64, 16))),
    ("projection", dict(projection=torch.zeros(2, 32, 16))),
    ("projection", dict(projection=torch.zeros(1, 2, 64, 16))),
    ("projection", dict(projection=torch.zeros(2, 64, 16).half())),
    ("projection", dict(projection=torch.zeros(2, 64, 32)[..., ::2])),
    ("projection", dict(projection=torch.zeros(2 * 64 * 16 + 1)[1:].view(2, 64, 16))),
    ("keys.*columns of projection", dict(projection=torch.zeros(2, 64, 32))),
)


@pytest.mark.parametrize("name, change", BAD_CALLS)
def test_bad_calls_name_the_argument(name, change):
    arguments = dict(q=torch.zeros(2, 4, 1, 64), keys=torch.zeros(2, 2, 50, 16))
    with pytest.raises(ValueError, match=name):
        attnsieve.proxy_scores(**arguments | change)


def test_refusals_name_what_is_missing():
    q, keys = torch.zeros(2, 4, 1, 64), torch.zeros(2, 2, 50, 16)
    projection = torch.zeros(2, 64, 16)
    with pytest.raises(NotImplementedError, match="head_dim 12.*multiple of 8"):
        attnsieve.proxy_scores(torch.zeros(2, 4, 1, 12), keys, projection=torch.zeros(2, 12, 16))
    with pytest.raises(TypeError, match="projection"):
        attnsieve.proxy_scores(q, keys, projection=[1.0])
    with pytest.raises(NotImplementedError, match="no backward"):
        attnsieve.proxy_scores(q, keys, projection=projection.requires_grad_())


@pytest.mark.parametrize("shape", [(0, 4, 1, 64), (2, 4, 0, 64), (2, 4, 1, 64)])
def test_empty(op, shape):
    q, projection = torch.zeros(shape), torch.zeros(2, 64, 16)
    none = torch.zeros(shape[0], 2, 0, 16)
    assert op.proxy_scores(q, none, projection=projection).shape == (shape[0], shape[2], 4, 0)
    some = torch.zeros(shape[0], 2, 5, 16)
    scores = op.proxy_scores(q, some, projection=projection, row_reduce="sum")
    assert scores.shape == (shape[0], 4, 5)
    assert (scores == (0 if shape[2] else -math.inf)).all()
