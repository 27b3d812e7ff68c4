"""topk_attention keeps the keys its rule names and attends to exactly those.

The rules are in ``topk_rules.py``.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import attnsieve
from attnsieve import TokenIndex
from cases import DTYPES, pairwise, randn
from layouts import page_bounds
from numerics import assert_attention_close, assert_bitwise, pytorch_same_dtype
from topk_rules import expected_lists, expected_lse, forced_units, paged, seen_pairs

INF = math.inf
HEADS = ((1, 1), (8, 8), (8, 2), (6, 3), (12, 4))


CASES = pairwise(
    dtype=DTYPES["cpu"],
    heads=HEADS,
    rows=(1, 2, 5, 8),
    lengths=((1, 0), (17, 64), (129, 3), (700, 333)),
    rule=("quest", "exact"),
    page_size=(1, 16, 64),
    cache=(None, "paged"),
    lists=("q", "kv", "one"),
    k=(64, 128, 320),
    sink_tokens=(0, 3),
    recent_tokens=(0, 1, 5),
    causal=(True, False),
    sink=(False, True),
)


def build(pick):
    """Small integers: every dot product and bound is exact, so ties are ties in any precision."""
    heads, rows, lengths = pick["heads"], pick["rows"], pick["lengths"]
    capacity = max(*lengths, 1) + 5
    generator = torch.Generator().manual_seed(7)

    def draw(num_heads, n):
        shape = (2, num_heads, n, 64)
        return torch.randint(-3, 4, shape, generator=generator).to(pick["dtype"])

    return draw(heads[0], rows), draw(heads[1], capacity), draw(heads[1], capacity)


@pytest.mark.parametrize("pick", CASES, ids=[str(i) for i in range(len(CASES))])
def test_equals_the_rule_written_out(device, pick):
    if device == "cuda" and pick["dtype"] == torch.float32:
        pytest.skip("CUDA kernels take float16 and bfloat16")
    q, k, v = build(pick)
    heads, lengths, unit = pick["heads"], list(pick["lengths"]), pick["page_size"]
    forced = forced_units(10**4, unit, pick["sink_tokens"], pick["recent_tokens"])
    pick = pick | dict(k=max(pick["k"], len(forced) * unit))
    num_lists = {"q": heads[0], "kv": heads[1], "one": 1}[pick["lists"]]
    lists = expected_lists(pick["rule"], q.double(), k.double(), lengths, num_lists, pick)
    seen = seen_pairs(lists, 2, heads[0], q.shape[2], k.shape[2])
    options = {n: pick[n] for n in ("k", "page_size", "sink_tokens", "recent_tokens", "causal")}
    caches = [k, v]
    if pick["cache"] is None:
        caches = [x.clone() for x in caches]
        for b, length in enumerate(lengths):
            for x in caches:
                x[b, :, length:] = math.nan
    if pick["cache"] == "paged":
        caches, more = paged(k, v, lengths, unit, pick["rule"])
        options |= more
    elif pick["rule"] == "quest":
        bounds = torch.full((2, -(-k.shape[2] // unit), heads[1], 2, 64), math.nan).to(k.dtype)
        for b, length in enumerate(lengths):
            if length:
                own = page_bounds(k[b : b + 1, :, :length], unit)[0]
                bounds[b, : len(own)] = own
        options["bounds"] = bounds
    if pick["sink"]:
        options["sink"] = randn((heads[0],), seed=3)
    options["seq_lens"] = torch.tensor(lengths, dtype=torch.int32)
    moved = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    out, index, lse = attnsieve.topk_attention(
        *(x.to(device) for x in (q, *caches)),
        score=pick["rule"],
        num_lists=num_lists,
        return_index=True,
        return_lse=True,
        **moved,
    )
    assert (index.num_lists, index.page_size) == (num_lists, unit)
    assert index.per_row == (q.shape[2] > 1)
    for (b, g, i), kept in lists.items():
        where = (b, i, g) if index.per_row else (b, g)
        entries = index.indices[where][: int(index.counts[where])].tolist()
        assert entries == sorted({j // unit for j in kept}), (b, g, i)
    sink = options.get("sink")
    ref = pytorch_same_dtype(*(x.double() for x in (q, k, v)), seen.long(), sink=sink)
    pt = pytorch_same_dtype(q, k, v, seen.long(), sink=sink)
    ref = ref[0], expected_lse(q, k, seen, sink)
    assert_attention_close(out.cpu(), lse.cpu(), ref, pt, str(pick))


class _Calls(TorchDispatchMode):
    """Names of every operation that reaches a device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_a_step_is_three_ops():
    q, k, v = randn((1, 8, 1, 64)), randn((40, 16, 2, 64), seed=1), randn((40, 16, 2, 64), seed=2)
    where = dict(block_table=torch.arange(40).int()[None], seq_lens=torch.tensor([600]).int())
    bounds = torch.stack([k.amin(1), k.amax(1)], 2)
    three = ["attnsieve::proxy_scores", "attnsieve::select_topk", "attnsieve::decode"]
    for options in (dict(bounds=bounds), dict(score="exact"), dict(score="exact", page_size=16)):
        for rows in (q, q.repeat(1, 1, 3, 1)):
            with _Calls() as calls:
                _, index = attnsieve.topk_attention(
                    rows, k, v, k=64, return_index=True, **where, **options
                )
            assert calls.names == three
    with _Calls() as calls:
        attnsieve.topk_attention(rows, k, v, reuse=index, **where)
    assert calls.names == three[2:]
    scores = randn((1, 1, 640))
    with _Calls() as calls:
        attnsieve.topk_attention(q, k, v, k=64, score=scores, **where)
    assert calls.names == three[1:]


def test_a_list_per_row_is_a_call_per_row():
    """Rows of one call choose and attend as calls of one row at their lengths do."""
    q, k, v = (randn((2, h, n, 64), seed=h) for h, n in ((8, 4), (2, 200), (2, 200)))
    for options in (dict(), dict(page_size=16), dict(num_lists=8), dict(score_softmax=True)):
        options |= dict(score="exact", k=32, return_index=True)
        whole, index = attnsieve.topk_attention(q, k, v, **options)
        for i in range(4):
            lens = torch.full((2,), 197 + i, dtype=torch.int32)
            row, own = attnsieve.topk_attention(q[:, :, i : i + 1], k, v, seq_lens=lens, **options)
            assert_bitwise(index.indices[:, i], own.indices)
            torch.testing.assert_close(whole[:, :, i : i + 1], row, rtol=1e-5, atol=1e-6)


def test_rows_share_a_list_on_request():
    q, k, v = (randn((1, h, n, 64), seed=h) for h, n in ((4, 3), (2, 90), (2, 90)))
    options = dict(score="exact", k=16, return_index=True, recent_tokens=0)
    _, index = attnsieve.topk_attention(q, k, v, row_reduce="max", num_lists=1, **options)
    assert index.indices.shape == (1, 1, 16)
    dots = torch.stack([q[0, h] @ k[0, h // 2].T for h in range(4)])
    dots[:, 0, 88:], dots[:, 1, 89:] = -INF, -INF
    assert index.indices[0, 0].tolist() == sorted(dots.amax((0, 1)).topk(16).indices.tolist())


def test_heads_vote_by_softmax():
    """A head with large logits outvotes the others unless each becomes its softmax first."""
    k = torch.zeros(1, 1, 50, 64)
    k[0, 0, 7, 0], k[0, 0, 9, 0] = 1.0, 0.9  # head 0 likes 7, then 9; weakly
    k[0, 0, 20, 1], k[0, 0, 21, 1] = 1.0, 0.99  # head 1 likes 20, then 21; strongly
    q = torch.zeros(1, 2, 1, 64)
    q[0, 0, 0, 0], q[0, 1, 0, 1] = 6.0, 1000.0
    options = dict(score="exact", k=2, num_lists=1, recent_tokens=0, return_index=True)
    options |= dict(score_scale=1.0, head_reduce="sum")
    assert attnsieve.topk_attention(q, k, k, **options)[1].indices.tolist() == [[[20, 21]]]
    voted = attnsieve.topk_attention(q, k, k, score_softmax=True, **options)[1]
    assert voted.indices.tolist() == [[[7, 20]]]


def test_own_scores_decide():
    q, k, v = (randn((2, h, n, 64), seed=h) for h, n in ((4, 1), (2, 100), (2, 100)))
    scores = randn((2, 2, 100), seed=9)
    options = dict(k=10, score=scores, return_index=True)
    lens = torch.tensor([100, 37], dtype=torch.int32)
    out, index = attnsieve.topk_attention(q, k, v, seq_lens=lens, **options)
    for b, n in enumerate(lens.tolist()):
        for g in range(2):
            chosen = sorted([*scores[b, g, : n - 1].topk(9).indices.tolist(), n - 1])
            assert index.indices[b, g].tolist() == chosen
            weights = torch.softmax(q[b, 2 * g : 2 * g + 2, 0] @ k[b, g, chosen].T / 8, -1)
            torch.testing.assert_close(out[b, 2 * g : 2 * g + 2, 0], weights @ v[b, g, chosen])
    pages = attnsieve.topk_attention(q, k, v, k=32, page_size=16, score=randn((2, 1, 7)))
    assert pages.shape == q.shape


def test_an_index_can_be_used_again():
    """Over other keys and another query: the lists of one layer, the contents of another."""
    q, k, v = (randn((1, h, n, 64), seed=h) for h, n in ((4, 1), (2, 100), (2, 100)))
    _, index = attnsieve.topk_attention(q, k, v, k=12, score="exact", return_index=True)
    q, k, v = (x.flip(-1) for x in (q, k, v))
    out, same = attnsieve.topk_attention(q, k, v, reuse=index, return_index=True)
    assert same is index
    for h in range(4):
        kept = index.indices[0, h // 2].tolist()
        weights = torch.softmax(q[0, h] @ k[0, h // 2, kept].T / 8, -1)
        torch.testing.assert_close(out[0, h], weights @ v[0, h // 2, kept])


@given(
    length=st.integers(0, 120),
    k=st.integers(1, 40),
    page_size=st.sampled_from([1, 4, 16]),
    sink_tokens=st.integers(0, 20),
    recent_tokens=st.integers(0, 20),
    rows=st.integers(1, 3),
)
def test_no_key_is_lost_or_doubled(length, k, page_size, sink_tokens, recent_tokens, rows):
    """Forced ranges, budget and page edges: each kept once, all where the budget covers all."""
    k *= page_size
    q, keys = randn((1, 2, rows, 64)), randn((1, 1, 120, 64), seed=1)
    options = dict(score="exact", k=k, page_size=page_size, return_index=True)
    options |= dict(sink_tokens=sink_tokens, recent_tokens=recent_tokens)
    options["seq_lens"] = torch.tensor([length], dtype=torch.int32)
    sink = -(-sink_tokens // page_size)
    recent = 0 if recent_tokens == 0 else 1 + -(-(recent_tokens - 1) // page_size)
    if (sink + recent) * page_size > k:
        with pytest.raises(ValueError, match="sink_tokens, recent_tokens"):
            attnsieve.topk_attention(q, keys, keys, **options)
        return
    _, index = attnsieve.topk_attention(q, keys, keys, **options)
    for i in range(rows):
        where = (0, i, 0) if rows > 1 else (0, 0)
        visible = max(length - rows + 1 + i, 0)
        entries = index.indices[where][: int(index.counts[where])].tolist()
        units = -(-visible // page_size)
        assert len(entries) == len(set(entries)) == min(units, k // page_size)
        keys_kept = {j for u in entries for j in range(u * page_size, (u + 1) * page_size)}
        wanted = {*range(min(sink_tokens, visible)), *range(visible - recent_tokens, visible)}
        assert {j for j in wanted if j >= 0} <= keys_kept
        if visible <= k - page_size * (page_size > 1):
            assert set(range(visible)) <= keys_kept


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17])
def test_short_sequences_are_attended_to_completely(length):
    q, k, v = (randn((2, h, n, 64), seed=h) for h, n in ((4, 1), (2, 64), (2, 64)))
    lens = torch.tensor([length, 64], dtype=torch.int32)
    out, lse = attnsieve.topk_attention(q, k, v, score="exact", seq_lens=lens, return_lse=True)
    want = attnsieve.decode(q, k, v, seq_lens=lens, return_lse=True)
    for x, y in zip((out, lse), want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    assert length or ((out[0] == 0).all() and (lse[0] == -INF).all())


def test_empty_batch_and_rows():
    for shape in ((0, 4, 1, 64), (2, 4, 0, 64)):
        k = torch.zeros(shape[0], 2, 30, 64)
        out = attnsieve.topk_attention(torch.zeros(shape), k, k, score="exact", k=8)
        assert out.shape == shape


def test_quest_bound_keeps_the_page_of_the_best_key():
    """No key outside the kept pages has a larger product than every page bound that was kept."""
    q, k = randn((2, 4, 1, 64)), randn((2, 2, 640, 64), seed=1)
    bounds = page_bounds(k, 16)
    _, index = attnsieve.topk_attention(
        q, k, k, bounds=bounds, page_size=16, k=160, num_lists=4, return_index=True
    )
    for b in range(2):
        for h in range(4):
            dots = (k[b, h // 2] @ q[b, h, 0]).split(16)
            low, high = bounds[b, :, h // 2, 0], bounds[b, :, h // 2, 1]
            bound = torch.maximum(q[b, h, 0] * low, q[b, h, 0] * high).sum(-1)
            assert all(float(bound[u]) >= float(x.max()) - 1e-3 for u, x in enumerate(dots))
            kept = index.indices[b, h].tolist()
            free = [u for u in kept if u != 39]
            left = [u for u in range(39) if u not in kept]
            assert min(float(bound[u]) for u in free) >= max(float(bound[u]) for u in left)


BAD_CALLS = (
    ("score", dict(score="best"), ValueError),
    ("score", dict(score=3), TypeError),
    ("bounds", dict(score="quest"), ValueError),
    ("bounds", dict(bounds=torch.zeros(2, 4, 2, 2, 64)), ValueError),
    ("bounds", dict(score="quest", page_size=16, bounds=torch.zeros(2, 3, 2, 2, 64)), ValueError),
    ("page_size", dict(score="quest", bounds=torch.zeros(2, 4, 2, 2, 64)), ValueError),
    ("page_size", dict(page_size=0), ValueError),
    ("k: ", dict(k=0), ValueError),
    ("k: ", dict(k=24, page_size=16), ValueError),
    ("num_lists", dict(num_lists=3), ValueError),
    ("head_reduce", dict(head_reduce="min"), ValueError),
    ("row_reduce", dict(row_reduce="first"), ValueError),
    ("sink_tokens", dict(sink_tokens=-1), ValueError),
    ("recent_tokens", dict(recent_tokens=-1), ValueError),
    ("sink_tokens, recent_tokens", dict(k=4, sink_tokens=2, recent_tokens=3), ValueError),
    ("head_reduce", dict(score=torch.zeros(2, 1, 50), head_reduce="max"), ValueError),
    ("score_softmax", dict(score=torch.zeros(2, 1, 50), score_softmax=True), ValueError),
    ("scores", dict(score=torch.zeros(2, 50)), ValueError),
    ("index", dict(score=torch.zeros(2, 3, 50)), ValueError),
    ("reuse", dict(reuse=torch.zeros(2, 1, 5).int()), TypeError),
    ("q: ", dict(q=torch.zeros(2, 4, 64)), ValueError),
    ("seq_lens", dict(seq_lens=torch.tensor([3, 99]).int(), validate=True), ValueError),
    ("indices", dict(reuse=TokenIndex(torch.full((2, 1, 1), 50).int()), validate=True), ValueError),
)


@pytest.mark.parametrize("name, change, error", BAD_CALLS)
def test_bad_calls_name_the_argument(name, change, error):
    arguments = dict(q=torch.zeros(2, 4, 1, 64), score="exact")
    arguments |= {f"{x}_cache": torch.zeros(2, 2, 50, 64) for x in "kv"}
    with pytest.raises(error, match=name):
        attnsieve.topk_attention(**(arguments | change))
