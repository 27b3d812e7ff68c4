"""Prefill methods attend to what their papers say: each rule is written out in float64.

The rules are in ``prefill_rules.py``.
"""

import pytest
import torch

import attnsieve
import prefill_rules
from attnsieve import reference
from attnsieve.methods import (
    SpargeAttn,
    XAttention,
    antidiagonal_mass,
    block_mass,
    self_similarity,
)
from cases import randn

HEADS = ((3, 3), (4, 2), (4, 1))
SEQLENS = ((256, 256), (200, 200), (70, 330), (131, 129))


def inputs(heads, seqlens, device, dim=64):
    """Random rows on slow waves, so that some blocks matter and some resemble each other."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tensors = []
    for seed, (count, rows) in enumerate(zip(heads, seqlens, strict=True)):
        x = randn((1, count, rows, dim), torch.float32, "cpu", seed)
        waves = randn((1, count, rows // 50 + 2, dim), torch.float32, "cpu", 10 + seed)
        x = 0.7 * x + 2 * waves.repeat_interleave(50, 2)[:, :, :rows]
        tensors.append(x.to(dtype).to(device))
    return tensors


def check(index, expected, num_blocks):
    """Every row keeps the set of its rule; rows within rounding of another set are few."""
    kept = index.to_dense(num_blocks)[0].flatten(0, 1).cpu()
    assert kept.shape[0] == len(expected)
    sets = [set(row.nonzero().flatten().tolist()) for row in kept]
    assert sum(close for _, close in expected) <= len(expected) // 10
    for row, (found, (wanted, close)) in enumerate(zip(sets, expected, strict=True)):
        assert found == wanted or close, (row, found, wanted)
    index.validate(num_blocks)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seqlens", SEQLENS)
@pytest.mark.parametrize("stride", [1, 4, 16])
def test_antidiagonal_mass(device, causal, seqlens, stride):
    q, k = inputs((4, 2), seqlens, device)
    found = antidiagonal_mass(q, k, stride=stride, block_q=64, block_k=32, causal=causal)
    squares = prefill_rules.antidiagonal_mass(
        q[0].double().cpu(), k[0].double().cpu(), stride, causal
    )
    rows = [x.sum(1) for x in squares.split(64 // stride, 1)]
    blocks = [torch.stack([x.sum(1) for x in row.split(32 // stride, 1)], 1) for row in rows]
    tolerance = dict(rtol=1e-4, atol=1e-6) if device == "cpu" else dict(rtol=0.1, atol=0.02)
    torch.testing.assert_close(found[0].double().cpu(), torch.stack(blocks, 1), **tolerance)


@pytest.mark.parametrize("causal", [True, False])
def test_stride_one_is_the_attention_mass(device, causal):
    q, k = inputs((4, 2), (192, 320), device)
    options = dict(block_q=64, block_k=32, causal=causal)
    found = antidiagonal_mass(q, k, stride=1, **options) / 64
    tolerance = dict(rtol=1e-4, atol=1e-6) if device == "cpu" else dict(rtol=0.1, atol=0.02)
    torch.testing.assert_close(found, block_mass(q, k, **options), **tolerance)


def test_antidiagonal_mass_in_chunks(monkeypatch):
    q, k = inputs((4, 2), (330, 330), "cpu")
    options = dict(stride=8, block_q=64, block_k=64, causal=True)
    whole = antidiagonal_mass(q, k, **options)
    monkeypatch.setattr("attnsieve.methods.xattention._CHUNK", 4 * 42 * 16)  # two rows of blocks
    torch.testing.assert_close(antidiagonal_mass(q, k, **options), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("seqlens", SEQLENS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("blocks", [(128, 128), (64, 32)])
def test_xattention(heads, seqlens, causal, blocks):
    q, k = inputs(heads, seqlens, "cpu")
    method = XAttention(tau=0.7, stride=8, block_q=blocks[0], block_k=blocks[1])
    index = method.select(q, k, causal=causal)
    expected = prefill_rules.xattention(q[0].double(), k[0].double(), 0.7, 8, *blocks, causal)
    check(index, expected, -(-seqlens[1] // blocks[1]))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("seqlens", SEQLENS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rule", [dict(cdf=0.8), dict(cdf=None, topk=0.4)])
@pytest.mark.parametrize("sink", [False, True])
def test_spargeattn(heads, seqlens, causal, rule, sink):
    q, k = inputs(heads, seqlens, "cpu")
    method = SpargeAttn(similarity=0.6, attention_sink=sink, block_q=64, block_k=32, **rule)
    index = method.select(q, k, causal=causal)
    expected = prefill_rules.spargeattn(
        q[0].double(), k[0].double(), 0.6, rule["cdf"], rule.get("topk"), sink, 64, 32, causal
    )
    check(index, expected, -(-seqlens[1] // 32))


def test_spargeattn_judges_blocks_both_ways():
    """Without this the cases above could all lie on one side of ``similarity``."""
    q, k = inputs((4, 2), (256, 256), "cpu")
    for x, block in ((q, 64), (k - k.mean(2, keepdim=True), 32)):
        told = self_similarity(x, block) > 0.6
        assert told.any() and not told.all()


def test_self_similarity(device):
    x = inputs((3, 3), (150, 150), device)[0]
    x[0, 0, :70] = 0  # a block of zeros, and one with some
    found = self_similarity(x, 64)
    expected = [[prefill_rules.cosine(b) for b in h.split(64)] for h in x[0].double().cpu()]
    torch.testing.assert_close(
        found[0].cpu().double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-5
    )
    assert found[0, 0, 0] == 0


@pytest.mark.parametrize("method", [XAttention(0.6, block_q=64, block_k=64), SpargeAttn()])
def test_attends_to_what_it_selects(device, method):
    q, k = inputs((4, 2), (300, 300), device)
    v = randn(k.shape, k.dtype, device, 7)
    out = method(q, k, v, causal=True)
    index = method.select(q, k, causal=True)
    expected = reference.block_sparse_attention(q, k, v, index, causal=True)
    tolerance = 1e-4 if device == "cpu" else 2e-2
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_spargeattn_skips_by_threshold():
    q, k = inputs((4, 2), (512, 512), "cpu")
    v = randn(k.shape, k.dtype, "cpu", 7)
    exact, skipping = (SpargeAttn(pv_threshold=p) for p in (None, 3.0))
    index = exact.select(q, k, causal=True)
    out, counters = attnsieve.reference.threshold_attention(
        q, k, v, 2.0**-3, index=index, skip_block=64, causal=True, return_counters=True
    )
    assert counters[..., 0].sum() > 0
    torch.testing.assert_close(skipping(q, k, v, causal=True).double(), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [XAttention(), SpargeAttn()])
def test_windows_are_refused(method):
    q, k = inputs((2, 2), (64, 64), "cpu")
    with pytest.raises(NotImplementedError, match="window"):
        method(q, k, k, causal=True, window=(16, 0))


def test_arguments():
    q, k = inputs((2, 2), (64, 64), "cpu")
    with pytest.raises(ValueError, match="stride: 24 "):
        antidiagonal_mass(q, k, stride=24)
    with pytest.raises(ValueError, match="cdf or topk"):
        SpargeAttn(topk=0.5)
    with pytest.raises(ValueError, match="cdf or topk"):
        SpargeAttn(cdf=None)


@pytest.mark.parametrize("method", [XAttention(), SpargeAttn()])
@pytest.mark.parametrize("seqlens", [(0, 128), (128, 0), (0, 0)])
def test_empty(method, seqlens):
    q, k = (torch.zeros(1, 2, rows, 64) for rows in seqlens)
    out = method(q, k, k, causal=False)
    assert out.shape == q.shape and not out.any()
