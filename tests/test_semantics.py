"""One test per promise of the semantics, named after its line.

Promises with a file of their own: strides (test_strides), sizes above 2**31 (test_large), memory
that was not selected (test_poison), threshold skipping (test_selection_threshold), selection rules
(test_selection_block), what an index and pages select (test_semantics_lists), codes of rows
(test_quantize_blocks), estimates from them (test_estimate_block_scores, test_quantized_estimate,
test_estimate_promises), determinism, streams, errors and the index formats (test_index).
"""

import math

import pytest
import torch

import attnsieve
from attnsieve import BlockIndex, reference
from cases import (
    BAD_IDS,
    DTYPES,
    Problem,
    head_dims,
    qkv,
    randn,
    random_index,
)
from numerics import assert_bitwise, check_against_oracle

attend = attnsieve.block_sparse_attention


def test_transposed_bshd_tensors_are_taken_without_a_copy(device):
    q, k, v = qkv(device, (2, 4, 100, 64), (2, 2, 150, 64))
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not views[0].is_contiguous()
    assert_bitwise(attend(*views, return_lse=True), attend(q, k, v, return_lse=True), "BSHD")


def test_query_head_h_uses_kv_head_h_div_group(device):
    """Heads 0..2 read KV head 0 and 3..5 KV head 1; with modulo the values would differ."""
    q, k, v = qkv(device, (1, 6, 20, 64), (1, 2, 70, 64))
    v[:, 0], v[:, 1] = 1.0, 2.0
    out = attend(q, k, v).float()
    assert out[0, :, 0, 0].tolist() == pytest.approx([1.0] * 3 + [2.0] * 3, rel=1e-6)


def test_dtypes_are_kept_and_lse_is_float32(device):
    for dtype in DTYPES[device]:
        q, k, v = qkv(device, (1, 2, 10, 64), (1, 2, 20, 64), dtype)
        out, lse = attend(q, k, v, return_lse=True)
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        assert lse.shape == (1, 2, 10)


def test_sums_are_accumulated_in_float32(device):
    """6000 equal weights: a half-precision sum would stop growing long before."""
    for dtype in DTYPES[device]:
        q = torch.zeros(1, 1, 3, 64, dtype=dtype, device=device)
        k = torch.zeros(1, 1, 6000, 64, dtype=dtype, device=device)
        v = torch.ones_like(k)
        out, lse = attend(q, k, v, return_lse=True)
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(6000)), rtol=0, atol=2e-6)
        torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-6)


def test_softmax_scale_defaults_to_one_over_sqrt_head_dim(device):
    for head_dim in head_dims(device):
        q, k, v = qkv(device, (1, 1, 70, head_dim), (1, 1, 70, head_dim))
        explicit = attend(q, k, v, softmax_scale=head_dim**-0.5, return_lse=True)
        assert_bitwise(attend(q, k, v, return_lse=True), explicit, "default scale")


def test_lse_is_the_natural_logarithm_with_the_sink_included(device):
    q = torch.zeros(1, 2, 5, 64, dtype=DTYPES[device][0], device=device)
    k, v = torch.zeros_like(q[:, :1].expand(1, 1, 5, 64)), torch.ones_like(q[:, :1])
    sink = torch.tensor([0.0, math.log(5.0)], device=device)
    out, lse = attend(q, k, v, sink=sink, return_lse=True)
    wanted = torch.tensor([math.log(6.0), math.log(10.0)], device=device)
    torch.testing.assert_close(lse[0, :, 0], wanted, rtol=0, atol=2e-6)
    weight = torch.tensor([5 / 6, 1 / 2], device=device).to(out.dtype)
    torch.testing.assert_close(out[0, :, 0, 0], weight, rtol=2**-8, atol=0)


def test_sink_is_not_scaled_by_softmax_scale(device):
    q, k, v = qkv(device, (1, 2, 60, 64), (1, 2, 90, 64))
    options = dict(sink=torch.tensor([1.5, -2.0], device=device), softmax_scale=0.01)
    check_against_oracle(attend, Problem(q, k, v, None, options), "sink")


@pytest.mark.parametrize("seqlens", [(10, 30), (30, 10), (64, 64), (65, 200), (1, 129)], ids=str)
def test_causal_is_aligned_bottom_right(device, seqlens):
    """v = one-hot of the key, so out shows exactly which keys a row saw."""
    seqlen_q, seqlen_k = seqlens
    offset = seqlen_k - seqlen_q
    q = torch.zeros(1, 1, seqlen_q, 64, dtype=torch.float16, device=device)
    k = torch.zeros(1, 1, seqlen_k, 64, dtype=torch.float16, device=device)
    v = torch.zeros_like(k)
    v[0, 0, :, 0] = torch.arange(seqlen_k, device=device)
    out, lse = attend(q, k, v, causal=True, return_lse=True)
    for row in (0, seqlen_q // 2, seqlen_q - 1):
        seen = max(0, row + offset + 1)
        expected = math.log(seen) if seen else -math.inf
        assert float(lse[0, 0, row]) == pytest.approx(expected, abs=1e-5)
        mean = (seen - 1) / 2 if seen else 0.0
        assert float(out[0, 0, row, 0]) == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize(
    "window", [(0, 0), (3, 2), (-1, 2), (3, -1), (-1, -1), (500, 500)], ids=str
)
def test_window_is_relative_to_the_same_diagonal(device, window):
    seqlen_q, seqlen_k = 70, 140
    q = torch.zeros(1, 1, seqlen_q, 64, dtype=torch.float16, device=device)
    k = torch.zeros(1, 1, seqlen_k, 64, dtype=torch.float16, device=device)
    _, lse = attend(q, k, k, window=window, return_lse=True)
    left, right = (seqlen_k if side < 0 else side for side in window)
    for row in (0, 1, 30, 69):
        at = row + seqlen_k - seqlen_q
        seen = min(seqlen_k - 1, at + right) - max(0, at - left) + 1
        assert float(lse[0, 0, row]) == pytest.approx(math.log(seen), abs=1e-5)


def test_window_with_causal_ends_at_the_diagonal(device):
    q, k, v = qkv(device, (1, 1, 100, 64), (1, 1, 100, 64))
    both = attend(q, k, v, causal=True, window=(20, 30), return_lse=True)
    assert_bitwise(both, attend(q, k, v, window=(20, 0), return_lse=True), "causal caps the right")


@pytest.mark.parametrize(
    "reason", ["no_keys", "empty_list", "window", "causal", "bad_ids", "short"]
)
def test_row_with_nothing_to_attend_to(device, reason):
    """out = 0 and lse = -inf, without and with the other rows of its tile being alive."""
    q, k, v = qkv(device, (2, 2, 130, 64), (2, 2, 0 if reason == "no_keys" else 100, 64))
    index, options, empty = None, {}, torch.ones(130, dtype=torch.bool, device=device)
    if reason == "empty_list":
        index = random_index(2, 2, 130, 100, density=1.0, device=device)
        index.counts[:, :, 1] = 0
        empty[:64], empty[128:] = False, False
    elif reason == "window":
        options = dict(window=(5, 0), causal=True)
        empty[30:] = False  # rows above key 0
    elif reason == "causal":
        options = dict(causal=True)
        empty[30:] = False
    elif reason == "bad_ids":
        ids = torch.tensor(BAD_IDS, device=device).expand(2, 2, 3, -1)
        index = BlockIndex(torch.full((2, 2, 3), 5, device=device).int(), ids.int(), 64, 64)
    elif reason == "short":
        index = random_index(2, 2, 130, 100, density=0.0, device=device)
    out, lse = attend(q, k, v, index, return_lse=True, **options)
    assert (out[:, :, empty] == 0).all() and (lse[:, :, empty] == -math.inf).all()
    assert out.isfinite().all() and lse[:, :, ~empty].isfinite().all()


def test_row_with_only_a_sink(device):
    q, k, v = qkv(device, (1, 2, 70, 64), (1, 2, 30, 64))
    sink = torch.tensor([0.5, -3.0], device=device)
    out, lse = attend(q, k, v, causal=True, sink=sink, return_lse=True)
    assert (out[:, :, :40] == 0).all()
    assert_bitwise(lse[0, :, 0], sink, "lse of a row without keys")


def test_leading_invalid_entries(device):
    """A list that starts with nothing visible must not poison the running maximum."""
    q, k, v = qkv(device, (1, 1, 64, 64), (1, 1, 640, 64))
    ids = torch.tensor([-1, -1, 99, -7, 3, 5], device=device).int().expand(1, 1, 1, -1)
    index = BlockIndex(torch.full((1, 1, 1), 6, device=device).int(), ids, 64, 64)
    clean = BlockIndex.from_dense(index.to_dense(10), 64, 64)
    expected = attend(q, k, v, clean, return_lse=True)
    assert_bitwise(attend(q, k, v, index, return_lse=True), expected, "leading invalid")


@pytest.mark.parametrize("tensor", ["k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_a_selected_key_or_value_reaches_only_rows_that_attend_to_it(device, tensor, value):
    for head_dim in head_dims(device):
        _check_spoiled(*qkv(device, *[(1, 2, 200, head_dim)] * 2), tensor, value)


def _check_spoiled(q, k, v, tensor, value):
    column = q.shape[-1] - 5
    clean = attend(q, k, v, causal=True, return_lse=True)
    spoiled = dict(k=k, v=v)
    spoiled[tensor] = spoiled[tensor].clone()
    spoiled[tensor][0, 1, 150, column] = value
    out, lse = attend(q, **spoiled, causal=True, return_lse=True)
    assert_bitwise(out[:, 0], clean[0][:, 0], "other head")
    assert_bitwise(out[:, 1, :150], clean[0][:, 1, :150], "rows before the key")
    assert_bitwise(lse[:, 1, :150], clean[1][:, 1, :150], "lse of rows before the key")
    if tensor == "v":
        assert not out[0, 1, 150:, column].isfinite().any()
        others = torch.arange(q.shape[-1], device=q.device) != column
        assert out[..., others].isfinite().all(), "other columns"
        assert_bitwise(lse, clean[1], "values do not touch lse")
    elif math.isnan(value):
        assert out[0, 1, 150:].isnan().all() and lse[0, 1, 150:].isnan().all()


def test_nan_in_a_query_reaches_only_its_row(device):
    q, k, v = qkv(device, (1, 2, 200, 64), (1, 2, 200, 64))
    clean = attend(q, k, v, causal=True)
    q[0, 1, 77, 5] = math.nan
    out = attend(q, k, v, causal=True)
    assert out[0, 1, 77].isnan().all()
    out[0, 1, 77] = clean[0, 1, 77]
    assert_bitwise(out, clean, "other rows")


@pytest.mark.parametrize("logit", [-6e4, -2.45e5, -524288.0, 6e4, 2.45e5])
def test_any_finite_logit_beats_a_masked_one(device, logit):
    """Equal, extreme logits on every visible key: the plain mean, whatever the masked keys hold."""
    dtype = DTYPES[device][0]
    q = torch.zeros(1, 1, 100, 64, dtype=dtype, device=device)
    k = torch.zeros(1, 1, 100, 64, dtype=dtype, device=device)
    q[..., 0], k[..., 0] = 256.0, logit / 256
    score = float(q[0, 0, 0, 0].double() * k[0, 0, 0, 0].double())
    v = randn((1, 1, 100, 64), dtype, device)
    out, lse = attend(q, k, v, causal=True, softmax_scale=1.0, return_lse=True)
    counts = torch.arange(1, 101, device=device)
    means = (v.double().cumsum(2) / counts[:, None]).to(dtype)
    torch.testing.assert_close(out, means, rtol=2**-7, atol=1e-2)
    expected = (score + counts.double().log()).expand(1, 1, 100)
    torch.testing.assert_close(lse.double(), expected, rtol=3e-7, atol=1e-4)


def test_one_large_logit_takes_all_mass(device):
    dtype = DTYPES[device][0]
    q = torch.zeros(1, 1, 3, 64, dtype=dtype, device=device)
    k = torch.zeros(1, 1, 300, 64, dtype=dtype, device=device)
    q[..., 0], k[..., 0], k[:, :, 123, 0] = 256.0, -1024.0, 64.0
    v = randn((1, 1, 300, 64), dtype, device)
    out = attend(q, k, v, softmax_scale=1.0)
    assert_bitwise(out, v[:, :, 123:124].expand_as(out), "the one key")


def test_threshold_is_final_and_not_a_scale_factor(device):
    """Doubling the keys' number does not change what a threshold decides about the same tiles."""
    q, k, v = qkv(device, (1, 1, 64, 64), (1, 1, 256, 64))
    far = torch.full_like(k, 0.0)
    k = torch.cat([far, k], dim=2)
    v = torch.cat([v, v], dim=2)
    walk = reference.threshold_walk(q, k, 0.05, skip_block=64)
    _, counters = attnsieve.threshold_attention(q, k, v, 0.05, skip_block=64, return_counters=True)
    assert (walk.margin > 1e-3).all()
    assert_bitwise(counters, walk.counters, "counters")


def test_results_come_in_the_documented_order(device):
    q, k, v = qkv(device, (1, 2, 70, 64), (1, 2, 70, 64))
    run = attnsieve.threshold_attention
    assert isinstance(run(q, k, v, 0.1), torch.Tensor)
    out, lse, counters = run(q, k, v, 0.1, return_lse=True, return_counters=True)
    assert out.shape == q.shape and lse.shape == (1, 2, 70) and counters.shape == (1, 2, 2)
    out, counters = run(q, k, v, 0.1, return_counters=True)
    assert counters.dtype == torch.int64
