"""lowrank_fit: against LRQK's iteration over whole queries and keys, as published, in NumPy."""

import numpy as np
import pytest
import torch

from attnsieve.lowrank import lowrank_fit, lowrank_step


def _published(q, k, rank, iterations, aq=None, ak=None):
    """A_Q, A_K, B_Q, B_K of one head (arXiv:2510.23649, both lambdas 1), rows and all."""
    if aq is None:
        best = np.argsort(-(np.abs(q).sum(0) + np.abs(k).sum(0)), kind="stable")[:rank]
        aq, ak = q[:, best], k[:, best]

    def explained(a, x):
        return np.linalg.lstsq(a, x, rcond=None)[0]

    for _ in range(iterations):
        bq, bk = explained(aq, q), explained(ak, k)
        aq = q @ (k.T @ ak + bq.T) @ np.linalg.inv(ak.T @ ak + bq @ bq.T)
        ak = k @ (q.T @ aq + bk.T) @ np.linalg.inv(aq.T @ aq + bk @ bk.T)
    return aq, ak, explained(aq, q), explained(ak, k)


def _tensors(device, heads=(4, 2), rows=(150, 170), dim=32, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    return [
        (torch.randn(2, h, n, dim, generator=generator, dtype=torch.float64) @ mix).to(
            device, dtype
        )
        for h, n in zip(heads, rows, strict=True)
    ]


def _close(actual, expected, tolerance=1e-5):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    worst = (actual.double().cpu() - expected).abs().max() / expected.abs().max()
    assert worst < tolerance, float(worst)


@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
def test_gram_matrices_do_what_whole_rows_do(device, iterations):
    q, k = _tensors(device)
    fit = lowrank_fit(q, k, 8, share="query_head", iterations=iterations)
    queries, keys = fit.queries(q), fit.keys(k)
    for b, h in np.ndindex(2, 4):
        own_q, own_k = q[b, h].cpu().numpy(), k[b, h // 2].cpu().numpy()
        aq, ak, bq, bk = _published(own_q, own_k, 8, iterations)
        _close(queries[b, h], aq)
        _close(keys[b, h], ak)
        _close(fit.from_q[b, h], bq)
        _close(fit.from_k[b, h], bk)


def test_equal_heads_of_a_group_share_what_one_has(device):
    q, k = _tensors(device)
    same = q[:, ::2].repeat_interleave(2, 1)
    shared = lowrank_fit(same, k, 8)
    own = lowrank_fit(same, k, 8, share="query_head")
    assert shared.to_k.shape == (2, 2, 32, 8)
    for name in ("to_q", "to_k", "from_q", "from_k"):
        _close(getattr(shared, name).repeat_interleave(2, 1), getattr(own, name).cpu())


def test_a_shared_fit_is_that_of_the_groups_rows(device):
    q, k = _tensors(device, rows=(170, 170))
    shared = lowrank_fit(q, k, 8)
    for b, h in np.ndindex(2, 2):
        # Rows of both heads, scaled so that their Gram matrix is the mean of the two.
        rows = q[b, 2 * h : 2 * h + 2].flatten(0, 1).cpu().numpy() / 2**0.5
        own_k = k[b, h].cpu().numpy()
        weights = np.abs(q[b, 2 * h : 2 * h + 2].cpu().numpy()).sum((0, 1)) / 2
        best = np.argsort(-(weights + np.abs(own_k).sum(0)), kind="stable")[:8]
        _, ak, _, _ = _published(rows, own_k, 8, 2, rows[:, best], own_k[:, best])
        _close(shared.keys(k)[b, h], ak)


@pytest.mark.parametrize("method", ["lrqk", "pca"])
@pytest.mark.parametrize("share", ["kv_head", "query_head"])
def test_a_full_rank_orders_keys_as_their_logits_do(device, method, share):
    q, k = _tensors(device, dtype=torch.float32)
    fit = lowrank_fit(q, k, 32, share=share, method=method)
    keys = fit.keys(k).repeat_interleave(4 // fit.to_k.shape[1], 1)
    found = fit.queries(q) @ keys.transpose(2, 3)
    logits = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3)
    _close(found, logits.cpu())
    kept = found.topk(16).indices
    least = logits.topk(16).values[..., -1:]
    assert (logits.gather(3, kept) >= least - 1e-4 * logits.abs().max()).all()


def test_products_of_low_rank_are_found(device):
    generator = torch.Generator().manual_seed(1)
    q, k = _tensors(device)
    basis = torch.randn(32, 6, generator=generator, dtype=torch.float64).to(device)
    k = k @ basis @ basis.T
    fit = lowrank_fit(q, k, 6, share="query_head", iterations=8)
    found = fit.queries(q) @ fit.keys(k).transpose(2, 3)
    _close(found, (q @ k.repeat_interleave(2, 1).transpose(2, 3)).cpu(), 1e-3)


def test_more_rank_explains_more_of_real_logits(device):
    q, k = _tensors(device, dim=64)
    logits = q @ k.repeat_interleave(2, 1).transpose(2, 3)
    errors = []
    for rank in (4, 16, 48):
        fit = lowrank_fit(q, k, rank, share="query_head")
        found = fit.queries(q) @ fit.keys(k).transpose(2, 3)
        errors.append(float((found - logits).norm() / logits.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.2


def test_pca_loses_the_trailing_singular_values(device):
    q, k = _tensors(device)
    fit = lowrank_fit(q, k, 8, method="pca")
    lost = k - fit.keys(k) @ fit.from_k.double()
    trailing = torch.linalg.svdvals(k.cpu())[..., 8:].square().sum(-1)
    _close(lost.square().sum((2, 3)), trailing)


def test_gaussian_starts_differ_and_repeat(device):
    q, k = _tensors(device)

    def fit(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return lowrank_fit(q, k, 8, start="gaussian", generator=generator).to_k

    assert torch.equal(fit(1), fit(1))
    assert not torch.allclose(fit(1), fit(2))


def test_tolerance_ends_the_iteration(device):
    q, k = _tensors(device)
    once = lowrank_fit(q, k, 8, iterations=1)
    assert torch.equal(lowrank_fit(q, k, 8, iterations=5, tolerance=1e9).to_k, once.to_k)
    all_five = lowrank_fit(q, k, 8, iterations=5)
    assert torch.equal(lowrank_fit(q, k, 8, iterations=5, tolerance=0.0).to_k, all_five.to_k)
    assert not torch.equal(once.to_k, all_five.to_k)


@pytest.mark.parametrize("method", ["lrqk", "pca"])
@pytest.mark.parametrize("rows", ["zero", "constant", "one key", "few", "none", "huge"])
def test_degenerate_rows_give_finite_projections(device, rows, method):
    q, k = _tensors(device, dtype=torch.float32)
    if rows == "zero":
        q, k = q * 0, k * 0
    elif rows == "constant":
        k = torch.ones_like(k)
    elif rows == "one key":
        k = k[:, :, :1]
    elif rows == "few":
        q, k = q[:, :, :3], k[:, :, :5]
    elif rows == "none":
        q, k = q[:, :, :0], k[:, :, :0]
    else:
        q, k = q * 1e15, k * 1e-15
    fit = lowrank_fit(q, k, 8, method=method)
    for part in (fit.to_q, fit.to_k, fit.from_q, fit.from_k):
        assert part.isfinite().all()


@pytest.mark.parametrize("method", ["lrqk", "pca"])
def test_what_is_not_finite_stays_in_its_head(device, method):
    q, k = _tensors(device)
    clean = lowrank_fit(q, k, 8, method=method)
    k[1, 0, 7, 3] = torch.nan
    fit = lowrank_fit(q, k, 8, method=method)
    assert not fit.to_k[1, 0].isfinite().all()
    fit.to_k[1, 0] = clean.to_k[1, 0]
    assert torch.equal(fit.to_k, clean.to_k)


def test_bfloat16_rows_are_taken_as_they_are(device):
    q, k = _tensors(device, dtype=torch.bfloat16)
    exact = lowrank_fit(q.double(), k.double(), 8)
    fit = lowrank_fit(q, k, 8)
    assert torch.equal(fit.to_k, exact.to_k)
    assert fit.keys(k).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_16_bit_rows(device, dtype):
    """Their Gram matrices may be float32 sums: products of projections stay what they stand for."""
    q, k = (x.to(dtype) for x in _tensors(device, rows=(1300, 17000), dim=64, dtype=torch.float32))
    fits = [lowrank_fit(x, y, 16) for x, y in ((q, k), (q.double(), k.double()))]
    got, want = (fit.to_q.double() @ fit.to_k.double().mT for fit in fits)
    assert float((got - want).norm() / want.norm()) < 1e-3
    for rows in (q[:, :, :, :1].expand(-1, -1, -1, 64), torch.zeros_like(q)):  # rank 1, rank 0
        fit = lowrank_fit(rows, rows[:, : k.shape[1]], 16)
        for part in (fit.to_q, fit.to_k, fit.from_q, fit.from_k):
            assert part.isfinite().all()


def _published_step(fit, q, k, keys, proxies, iterations):
    """One head's step with inverses updated by Sherman and Morrison's formula, and exact steps."""
    bq, bk = fit

    def updated(inverse, row, right):
        solved, other = inverse @ right, inverse @ row
        return solved - other * (row @ solved) / (1 + row @ other)

    inverse_q = np.linalg.inv(bq @ bq.T + proxies.T @ proxies)
    inverse_k = np.linalg.inv(bk @ bk.T)
    of_k = inverse_k @ (bk @ k)
    for _ in range(iterations):
        of_q = updated(inverse_q, of_k, bq @ q + proxies.T @ (keys @ q) + (q @ k) * of_k)
        of_k = updated(inverse_k, of_q, bk @ k + (q @ k) * of_q)
    bq = bq - np.outer(of_q, of_q @ bq - q) / (of_q @ of_q)
    bk = bk - np.outer(of_k, of_k @ bk - k) / (of_k @ of_k)
    return of_q, of_k, bq, bk


def _step(device, share, q_heads=None):
    q, k = _tensors(device, rows=(170, 170))
    if q_heads == "equal":
        q = q[:, ::2].repeat_interleave(2, 1)
    fit = lowrank_fit(q[:, :, :160], k[:, :, :160], 8, share=share)
    proxies = fit.keys(k)
    near = [x[:, :, 40:90] for x in (k, proxies)]
    near[0] = near[0].repeat_interleave(proxies.shape[1] // 2, 1)
    new_q, new_k = q[:, :, 165:166], k[:, :, 165:166]
    return fit, new_q, new_k, near, lowrank_step(fit, new_q, new_k, *near)


def test_a_step_is_the_published_one(device):
    fit, q, k, near, (refined, of_q, of_k) = _step(device, "query_head")
    for b, h in np.ndindex(2, 4):
        own = [x[b, h].double().cpu().numpy() for x in (fit.from_q, fit.from_k)]
        rows = [x.cpu().numpy() for x in (q[b, h, 0], k[b, h // 2, 0])]
        keys, proxies = (x[b, h].double().cpu().numpy() for x in near)
        want = _published_step(own, *rows, keys, proxies, 2)
        found = of_q[b, h, 0], of_k[b, h, 0], refined.from_q[b, h], refined.from_k[b, h]
        for x, y in zip(found, want, strict=True):
            _close(x, y)


@pytest.mark.parametrize("share", ["kv_head", "query_head"])
def test_a_step_makes_the_new_rows_reconstructible(device, share):
    _, q, k, _, (refined, of_q, of_k) = _step(device, share)
    heads = refined.from_q.shape[1]
    _close(of_q @ refined.from_q.repeat_interleave(4 // heads, 1).double(), q.cpu(), 1e-4)
    _close(of_k @ refined.from_k.double(), k.repeat_interleave(heads // 2, 1).cpu(), 1e-4)


def test_a_step_of_equal_heads_is_that_of_one(device):
    *_, (shared, of_q, of_k) = _step(device, "kv_head", "equal")
    *_, (own, own_q, own_k) = _step(device, "query_head", "equal")
    _close(of_q, own_q.cpu())
    _close(of_k.repeat_interleave(2, 1), own_k.cpu())
    _close(shared.from_q.repeat_interleave(2, 1), own.from_q.cpu(), 1e-4)
    _close(shared.from_k.repeat_interleave(2, 1), own.from_k.cpu())


def test_a_step_names_what_does_not_fit(device):
    fit, q, k, near, _ = _step(device, "kv_head")
    for given, name in (
        ((q[:, :3], k, *near), "q"),
        ((q, k[:, :1].repeat(1, 3, 1, 1), *near), "k"),
        ((q, k[:, :0], *near), "k"),
        ((q, k[0], *near), "k"),
        ((q, k[:1], *near), "k"),
        ((q, k, near[0][:, :1], near[1]), "resident_keys"),
        ((q, k, near[0], near[1][..., :4]), "resident_proxies"),
    ):
        with pytest.raises(ValueError, match=f"lowrank_step: {name}: expected"):
            lowrank_step(fit, *given)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(rank=0), "rank"),
        (dict(rank=33), "rank"),
        (dict(share="layer"), "share"),
        (dict(method="svd"), "method"),
        (dict(start="zeros"), "start"),
        (dict(iterations=-1), "iterations"),
        (dict(q=torch.zeros(2, 4, 5, 32, dtype=torch.int32)), "q: expected floating"),
        (dict(q=torch.zeros(4, 5, 32)), "q: expected floating"),
        (dict(k=torch.zeros(2, 3, 5, 32)), "k: its heads"),
        (dict(k=torch.zeros(2, 2, 5, 16)), "k: batch and head_dim"),
        (dict(k=torch.zeros(1, 2, 5, 32)), "k: batch and head_dim"),
    ],
)
def test_errors_name_the_argument(change, name):
    given = {"q": torch.zeros(2, 4, 5, 32), "k": torch.zeros(2, 2, 5, 32), "rank": 8, **change}
    q, k, rank = (given.pop(x) for x in ("q", "k", "rank"))
    with pytest.raises(ValueError, match=f"lowrank_fit: {name}"):
        lowrank_fit(q, k, rank, **given)
