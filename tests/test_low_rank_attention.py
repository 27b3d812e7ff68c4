"""low_rank_attention keeps the keys whose proxies score best and attends to exactly those."""

import pytest
import torch

import attnsieve
from cases import randn


def _integers(shape, seed, device, dtype):
    """Small ones: products and sums of them are exact, so the best keys are the same anywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).to(device, dtype)


def _dtype(device):
    return torch.float32 if device == "cpu" else torch.bfloat16


def _expected(q, k, v, scores, budget, recent, lists):
    """Lists, and attention to them in float64, of scores ``[B, Hq, Sq, S]``; no page is shared."""
    batch, heads, rows, length = scores.shape
    seen = torch.arange(length) <= torch.arange(length - rows, length)[:, None]
    forced = torch.arange(length) > torch.arange(length - rows, length)[:, None] - recent
    votes = scores.double().unflatten(1, (lists, -1)).amax(2)
    votes = votes.masked_fill(forced, torch.inf).masked_fill(~seen, -torch.inf)
    # Of equal scores the first key.
    order = votes.sort(dim=3, descending=True, stable=True).indices[..., :budget]
    kept = torch.zeros_like(votes, dtype=torch.bool).scatter_(3, order, True) & seen
    spread = kept.repeat_interleave(heads // lists, 1)
    group = heads // k.shape[1]
    logits = q.double() @ k.double().repeat_interleave(group, 1).transpose(2, 3) / q.shape[3] ** 0.5
    weights = logits.masked_fill(~spread, -torch.inf).softmax(-1)
    return kept, weights @ v.double().repeat_interleave(group, 1)


def _kept(index, rows, length):
    """bool ``[B, lists, rows, length]`` of a TokenIndex."""
    found = torch.zeros(*index.counts.shape, length, dtype=torch.bool)
    indices, counts = index.indices.cpu(), index.counts.cpu()
    exists = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
    found.scatter_(-1, indices.long().where(exists, indices[..., :1].long()), True)
    return found.transpose(1, 2) if found.dim() == 4 else found.unsqueeze(2)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("proxy_heads", [2, 4])
@pytest.mark.parametrize("lists", [1, 2, 4])
def test_equals_the_rule_written_out(device, rows, proxy_heads, lists):
    dtype = _dtype(device)
    q = _integers((2, 4, rows, 64), 0, device, dtype)
    k, v = (_integers((2, 2, 300, 64), seed, device, dtype) for seed in (1, 2))
    # One number of a query each, so that bfloat16 holds its projection.
    projection = torch.zeros(2, proxy_heads, 64, 8, device=device)
    places = torch.randint(0, 64, (2, proxy_heads, 8), generator=torch.Generator().manual_seed(3))
    projection.scatter_(2, places.to(device).unsqueeze(2), 1.0)
    proxy = _integers((2, proxy_heads, 300, 8), 4, device, dtype)
    out, index = attnsieve.low_rank_attention(
        q,
        k,
        v,
        projection=projection,
        proxy=proxy,
        k=64,
        num_lists=lists,
        recent_tokens=5,
        return_index=True,
    )
    parts = [x.cpu().double().repeat_interleave(4 // proxy_heads, 1) for x in (projection, proxy)]
    scores = q.cpu().double() @ parts[0] @ parts[1].transpose(2, 3)
    kept, want = _expected(q.cpu(), k.cpu(), v.cpu(), scores, 64, 5, lists)
    assert torch.equal(_kept(index, rows, 300), kept)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.cpu().double(), want, rtol=tolerance, atol=tolerance)


def test_a_full_rank_is_the_exact_choice(device):
    dtype = _dtype(device)
    q = _integers((1, 4, 1, 64), 0, device, dtype)
    k, v = (_integers((1, 2, 200, 64), seed, device, dtype) for seed in (1, 2))
    same = torch.eye(64, device=device).expand(2, 64, 64)
    options = dict(k=48, recent_tokens=4, return_index=True)
    out, index = attnsieve.low_rank_attention(q, k, v, projection=same, proxy=k, **options)
    want, exact = attnsieve.topk_attention(q, k, v, score="exact", head_reduce="max", **options)
    assert torch.equal(index.indices, exact.indices)
    assert torch.equal(out, want)


def test_fitted_proxies_find_what_exact_logits_find():
    """Keys of rank 8: a fit of rank 8 orders them as their logits do."""
    q, v = randn((1, 4, 100, 64)), randn((1, 2, 100, 64), seed=2)
    k = randn((1, 2, 100, 8), seed=1) @ randn((1, 2, 8, 64), seed=3)
    fit = attnsieve.lowrank_fit(q, k, 8, method="pca")
    options = dict(k=24, recent_tokens=1, num_lists=4, return_index=True)
    last = q[:, :, -1:]
    _, index = attnsieve.low_rank_attention(
        last, k, v, projection=fit.to_q, proxy=fit.keys(k), **options
    )
    _, exact = attnsieve.topk_attention(last, k, v, score="exact", **options)
    assert torch.equal(_kept(index, 1, 100), _kept(exact, 1, 100))


def test_pages_and_their_proxies_are_the_contiguous_cache(device):
    dtype = _dtype(device)
    q = _integers((2, 4, 1, 64), 0, device, dtype)
    k, v = (_integers((2, 2, 50, 64), seed, device, dtype) for seed in (1, 2))
    to_k = torch.zeros(2, 64, 16, device=device, dtype=dtype)
    to_k[0, :16], to_k[1, 20:36] = torch.eye(16), torch.eye(16)
    cache = attnsieve.PagedKVCache(
        10, 2, 64, batch=2, page_size=16, dtype=dtype, device=device, projection=to_k.unsqueeze(0)
    )
    cache.append(k, v)
    options = dict(projection=to_k, k=16, recent_tokens=2, return_lse=True)
    paged = attnsieve.low_rank_attention(
        q, cache.k[0], cache.v[0], proxy=cache.proxy[0], **cache.where, **options
    )
    whole = attnsieve.low_rank_attention(q, k, v, proxy=k @ to_k, **options)
    for x, y in zip(paged, whole, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3)


def test_codes_with_scales_are_proxies(device):
    dtype = _dtype(device)
    q = _integers((1, 2, 1, 64), 0, device, dtype)
    k, v = (_integers((1, 1, 90, 64), seed, device, dtype) for seed in (1, 2))
    projection = torch.eye(64, 16, device=device).unsqueeze(0)
    codes = (k @ projection.to(dtype)).to(torch.int8)
    scale = 2.0 ** torch.randint(-3, 4, (1, 1, 90), generator=torch.Generator().manual_seed(5))
    scale = scale.float().to(device)
    options = dict(projection=projection, k=16, recent_tokens=1, return_index=True)
    _, index = attnsieve.low_rank_attention(q, k, v, proxy=codes, proxy_scale=scale, **options)
    proxy = codes.to(dtype) * scale.unsqueeze(-1).to(dtype)
    _, plain = attnsieve.low_rank_attention(q, k, v, proxy=proxy, **options)
    assert torch.equal(index.indices, plain.indices)


@pytest.mark.parametrize("length", range(60, 75))
def test_no_token_lies_between_candidates_and_recent_ones(length):
    """Each key is a candidate or recent: with room for all of them, all are kept."""
    q, k = randn((1, 2, 1, 64)), randn((1, 1, 80, 64), seed=1)
    lengths = torch.tensor([length], dtype=torch.int32)
    for budget in (length - 1, length, length + 1):
        _, index = attnsieve.low_rank_attention(
            q,
            k,
            k,
            projection=torch.eye(64).unsqueeze(0),
            proxy=k,
            k=budget,
            recent_tokens=16,
            seq_lens=lengths,
            return_index=True,
        )
        kept = index.indices[0, 0, : int(index.counts[0, 0])].tolist()
        assert len(set(kept)) == len(kept) == min(budget, length)
        assert set(range(length - 16, length)) <= set(kept) <= set(range(length))


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_keys_past_the_length_and_unselected_ones_do_not_matter(device, junk):
    dtype = _dtype(device)
    q = _integers((2, 4, 1, 64), 0, device, dtype)
    k, v = (_integers((2, 2, 90, 64), seed, device, dtype) for seed in (1, 2))
    projection = torch.eye(64, 16, device=device).expand(2, 64, 16)
    lengths = torch.tensor([70, 33], dtype=torch.int32, device=device)
    options = dict(projection=projection, k=16, recent_tokens=4, seq_lens=lengths)
    proxy = k[..., :16].contiguous()
    out, index = attnsieve.low_rank_attention(q, k, v, proxy=proxy, return_index=True, **options)
    kept = _kept(index, 1, 90).to(device)[:, :, 0, :, None]
    past = torch.arange(90, device=device) >= lengths[:, None]
    proxy = proxy.masked_fill(past[:, None, :, None], junk)
    again = attnsieve.low_rank_attention(
        q, k.masked_fill(~kept, junk), v.masked_fill(~kept, junk), proxy=proxy, **options
    )
    assert torch.equal(again, out)


def test_empty_batch_and_rows():
    for shape in ((0, 4, 1, 64), (2, 4, 0, 64)):
        k = torch.zeros(shape[0], 2, 30, 64)
        out = attnsieve.low_rank_attention(
            torch.zeros(shape),
            k,
            k,
            projection=torch.zeros(2, 64, 8),
            proxy=k[..., :8],
            k=16,
            recent_tokens=4,
        )
        assert out.shape == shape


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(projection=torch.zeros(2, 32, 8)), "projection: expected"),
        (dict(projection=torch.zeros(64, 8)), "projection: expected"),
        (dict(projection=torch.zeros(3, 64, 8)), "projection: 3 heads"),
        (dict(projection=torch.zeros(3, 2, 64, 8)), "projection: expected a batch"),
        (dict(proxy=torch.zeros(1, 4, 30, 8)), "proxy: expected 2 heads"),
        (dict(proxy=torch.zeros(1, 2, 30)), "proxy: expected 2 heads"),
        (dict(q=torch.zeros(4, 1, 64)), "q: expected 4 dimensions"),
        (dict(k=8), "sink_tokens, recent_tokens"),
        (dict(num_lists=3), "num_lists: expected"),
    ],
)
def test_bad_calls_name_the_argument(change, name):
    given = dict(q=torch.zeros(1, 4, 1, 64), k_cache=torch.zeros(1, 2, 30, 64))
    given |= dict(v_cache=torch.zeros(1, 2, 30, 64), projection=torch.zeros(2, 64, 8))
    given |= dict(proxy=torch.zeros(1, 2, 30, 8), k=16, recent_tokens=9) | change
    with pytest.raises(ValueError, match=name):
        attnsieve.low_rank_attention(**given)
