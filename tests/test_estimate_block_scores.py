"""estimate_block_scores finds what its NumPy oracle finds pair by pair: maxima bit for bit."""

import dataclasses
import math

import pytest
import torch

import attnsieve
from attnsieve import reference
from attnsieve.methods import block_mass
from cases import BACKENDS, backend_id, backend_marks, pairwise, randn
from numerics import assert_bitwise

NAN, INF = math.nan, math.inf
FACTORS = dict(
    heads=((1, 1), (8, 2), (6, 3), (5, 1)),
    lengths=((1, 1), (64, 200), (130, 130), (333, 333), (129, 600), (300, 70), (520, 900)),
    bits=((8, 8), (8, 4), (4, 4)),
    q_scales=(1, 64, "query_pairs"),
    k_scales=(16, 32, 64, 128, "key_quads"),
    block_q=(64, 128),
    block_k=(16, 32, 64, 128),
    row_stride=(1, 2, 4, 8),
    mask=(None, "causal", "window"),
    threshold=(False, True),
    reduce_group=(False, True),
    out=("maxima", "bits", "sums"),
    key_pool=(1, 1, 2, 8),
    layout=("bhsd", "bshd", "packed"),
)


def cases() -> list:
    found = []
    for backend in BACKENDS:
        head_dims = (32, 64, 96, 256) if backend == "cpu" else (64, 96, 128, 256)
        for i, pick in enumerate(pairwise(**FACTORS, head_dim=head_dims)):
            marks, name = backend_marks(backend), f"{backend_id(backend)}-{i}"
            found.append(pytest.param(backend, pick, marks=marks, id=name))
    return found


def coded(shape, bits, scale_rows, layout, seed):
    x = randn(shape, torch.float32, seed=seed) * (1 + torch.arange(shape[2]) % 7)[:, None]
    if layout == "bshd":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout != "packed":
        return attnsieve.quantize_blocks(x, bits=bits, scale_rows=scale_rows)
    # A whole sequence, an empty one, and the beginning of another.
    part = shape[2] * 2 // 3
    cu_seqlens = torch.tensor([0, shape[2], shape[2], shape[2] + part], dtype=torch.int32)
    rows = torch.cat([x[0], x[1, :, :part]], 1).transpose(0, 1).contiguous()
    return attnsieve.quantize_blocks(rows, bits=bits, scale_rows=scale_rows, cu_seqlens=cu_seqlens)


def on(device, rows):
    moved = {n: getattr(rows, n) for n in ("codes", "scales", "cu_seqlens")}
    moved = {n: x if x is None else x.to(device) for n, x in moved.items()}
    return dataclasses.replace(rows, **moved)


def build(pick, seed=0):
    (heads, kv_heads), (rows, keys) = pick["heads"], pick["lengths"]
    q_bits, k_bits = pick["bits"]
    dim, packed = pick["head_dim"], pick["layout"] == "packed"
    pool = 1 if packed else pick["key_pool"]
    pooled = -(-keys // pool)
    q = coded((2, heads, rows, dim), q_bits, pick["q_scales"], pick["layout"], seed)
    k = coded((2, kv_heads, pooled, dim), k_bits, pick["k_scales"], pick["layout"], seed + 1)
    options = {name: pick[name] for name in ("block_q", "row_stride", "reduce_group")}
    options |= dict(key_pool=pool, block_k=pick["block_k"] * pool, bits=pick["out"] == "bits")
    options["causal"] = pick["mask"] == "causal"
    if pool != 1:
        options["seqlen_k"] = keys
    if packed:
        options |= dict(max_seqlen_q=rows, max_seqlen_k=keys)
    if pick["mask"] == "window":
        options["window"] = (90, 20)
    if pick["threshold"]:
        # About where half of the blocks lie.
        shape = (q.codes.shape[0], heads) if packed else (2, heads, rows)
        options["threshold"] = 12 + 6 * randn(shape, torch.float32, seed=seed + 2)
    if pick["out"] == "sums":
        options |= dict(reduce="sum", softmax_scale=0.02)  # exponentials within float32
    return q, k, options


@pytest.mark.parametrize("device, pick", cases())
def test_equals_the_oracle(device, pick):
    q, k, options = build(pick)
    device = "cpu" if device == "cpu" else "cuda"
    there = {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    found = attnsieve.estimate_block_scores(on(device, q), on(device, k), **there).cpu()
    expected = reference.estimate_block_scores(q, k, **options)
    if pick["out"] != "sums":
        return assert_bitwise(found, expected, str(pick))
    assert found.dtype == torch.float32 and torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("causal", [True, False])
def test_sums_are_the_attention_of_blocks(device, causal):
    """With the row's log-sum-exp as its threshold, within what 8 bits lose."""
    q, k = (randn((1, h, 300, 64), torch.float32, seed=h).to(device) for h in (4, 2))
    logits = torch.einsum("bhgsd,bhtd->bhgst", q.unflatten(1, (2, 2)), k).flatten(1, 2) / 8
    seen = reference.visible_mask(300, 300, causal=causal, device=device)
    lse = logits.masked_fill(~seen, -INF).logsumexp(-1)
    mass = attnsieve.estimate_block_scores(
        attnsieve.quantize_blocks(q, smooth=False),
        attnsieve.quantize_blocks(k, smooth=False, scale_rows=16),
        threshold=lse,
        reduce="sum",
        causal=causal,
    )
    true = block_mass(q, k, causal=causal)
    true[:, :, :-1] *= 64
    true[:, :, -1] *= 300 % 64
    torch.testing.assert_close(mass, true, rtol=0.02, atol=0.01)
    assert torch.allclose(mass.sum(-1), true.sum(-1), rtol=5e-3)


def test_sums_that_overflow_are_infinite(device):
    q, k = torch.ones(64, 64), torch.ones(64, 64)
    found = one_head(device, q, k, reduce="sum", softmax_scale=4.0)
    assert (found == INF).all()
    limits = torch.full((1, 1, 64), -INF, device=device)
    assert (one_head(device, q, k, threshold=limits, reduce="sum") == INF).all()


def one_head(device, rows, keys, dim=64, **options):
    q = attnsieve.quantize_blocks(rows[None, None].to(device), smooth=False)
    k = attnsieve.quantize_blocks(keys[None, None].to(device), smooth=False, scale_rows=16)
    return attnsieve.estimate_block_scores(q, k, **options)[0, 0].cpu()


def test_bounds_the_error_of_the_true_maximum(device):
    """Full resolution, 8 bits: within the quantisation steps of the real block maxima."""
    q, k = (randn((256, 128), torch.float32, seed=s) for s in (1, 2))
    found = one_head(device, q, k, softmax_scale=1.0)
    true = (q.double() @ k.double().T).unflatten(0, (-1, 64)).unflatten(2, (-1, 64))
    error = (found - true.amax((1, 3))).abs().max()
    assert 0 < error < 0.02 * float(true.abs().max())


@pytest.mark.parametrize("row_stride", [1, 2, 4, 8])
def test_only_sampled_rows_count(device, row_stride):
    q, k = torch.zeros(128, 64), torch.ones(64, 64)
    q[5], q[72] = 3.0, 2.0  # 72 is a multiple of 8
    found = one_head(device, q, k, row_stride=row_stride, softmax_scale=1.0)
    assert float(found[0, 0]) == (192.0 if row_stride == 1 else 0.0)
    assert float(found[1, 0]) == 128.0


@pytest.mark.parametrize("key", [0, 17, 40, 63])
@pytest.mark.parametrize("block_q", [64, 128])
def test_masks_are_exact_to_the_element(device, key, block_q):
    """One key is large; whether a block has it depends on the one row that sees it."""
    q, k = torch.ones(64, 64), torch.zeros(64, 64)
    k[key] = 4.0
    options = dict(block_q=block_q, block_k=16, softmax_scale=1.0)
    in_block = torch.arange(4) == key // 16
    for mask in (dict(causal=True), dict(window=(0, 0))):
        found = one_head(device, q, k, **mask, **options)
        assert torch.equal(found[0], in_block * 256.0)
    q[key] = 0
    assert not one_head(device, q, k, window=(0, 0), **options).any()
    q[key + 1 :] = 0  # the rows below see it under a causal mask, those above do not
    assert not one_head(device, q, k, causal=True, **options).any()
    # Keys that no row sees.
    found = one_head(device, q[:1], k, window=(5, -1), block_k=16)
    assert torch.equal(found[0] == -INF, torch.tensor([True, True, True, False]))


def test_numbers_that_are_not_finite_keep_their_blocks(device):
    q, k = randn((128, 64), torch.float32, seed=1), randn((200, 64), torch.float32, seed=2)
    k[70, 3] = INF
    found = one_head(device, q, k, threshold=torch.full((1, 1, 128), 1e9, device=device))
    assert torch.isnan(found[:, 1]).all() and (found[:, [0, 2, 3]] < 0).all()
    limits = torch.full((1, 1, 128), 1e9, device=device)
    words = one_head(device, q, k, threshold=limits, bits=True)
    assert (words == 2).all()
    q[3, 0] = NAN
    found = one_head(device, q, k[:64], causal=False)
    assert torch.isnan(found[0]).all() and not torch.isnan(found[1]).any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("power", [-40, -60, -64, -66])
def test_numbers_that_underflow(device, bits, power):
    """Products of scales that are denormal are still the same everywhere."""
    rows, keys = (2.0**power * randn((1, 1, 96, 64), torch.float32, seed=s) for s in (1, 2))
    q = attnsieve.quantize_blocks(rows.to(device), smooth=False)
    k = attnsieve.quantize_blocks(keys.to(device), smooth=False, scale_rows=16, bits=bits)
    found = attnsieve.estimate_block_scores(q, k, block_k=16)
    assert_bitwise(found, reference.estimate_block_scores(q, k, block_k=16))
    assert (found.abs() < 2.0 ** (2 * power + 8)).all() and found.any()


@pytest.mark.parametrize("out", ["bits", "maxima"])
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_thresholds_that_are_not_finite(device, scale, out):
    """Infinite ones, with infinite estimates too: a difference that is NaN counts as above."""
    rows, keys = (randn((1, 1, 128, 64), torch.float32, seed=s) * scale for s in (3, 4))
    limits = torch.zeros(1, 1, 128)
    for block, limit in enumerate((INF, -INF, NAN, 0.0)):
        limits[..., 32 * block : 32 * block + 32] = limit
    for first in (0, 64):  # of each half of the rows one kind, then both
        for some in (limits, limits.roll(32, -1), limits[..., first].expand_as(limits)):
            q = attnsieve.quantize_blocks(rows.to(device), smooth=False)
            k = attnsieve.quantize_blocks(keys.to(device), smooth=False, scale_rows=16)
            options = dict(block_k=16, softmax_scale=scale, bits=out == "bits", causal=True)
            some = some.contiguous().to(device)
            found = attnsieve.estimate_block_scores(q, k, threshold=some, **options)
            want = reference.estimate_block_scores(q, k, threshold=some, **options)
            assert_bitwise(found, want)


def test_empty(device):
    none = one_head(device, torch.zeros(0, 64), torch.zeros(70, 64))
    assert none.shape == (0, 2)
    assert one_head(device, torch.zeros(70, 64), torch.zeros(0, 64)).shape == (2, 0)


MISTAKES = {
    "row_stride": dict(row_stride=3),
    "block_q": dict(block_q=32),
    "block_k": dict(block_k=8),
    "softmax_scale": dict(softmax_scale=0.0),
    "threshold": dict(threshold=torch.zeros(1, 1, 3)),
    "reduce": dict(reduce="mean"),
    "bits": dict(reduce="sum", bits=True),
    "key_pool": dict(key_pool=3),
    "seqlen_k": dict(key_pool=2),
    "max_seqlen_q": dict(max_seqlen_q=70),
    "window": dict(window=(-2, 0)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_arguments_are_named(device, name):
    change = {
        n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in MISTAKES[name].items()
    }
    with pytest.raises((ValueError, RuntimeError), match=name):
        one_head(device, torch.ones(70, 64), torch.ones(80, 64), **change)


def test_scales_of_single_keys_are_refused(device):
    rows = attnsieve.quantize_blocks(torch.ones(1, 1, 40, 64, device=device))
    with pytest.raises((ValueError, RuntimeError), match="scales of k"):
        attnsieve.estimate_block_scores(rows, rows)
