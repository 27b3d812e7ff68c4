"""Arguments of threshold_attention: lambda in every shape, sparsity targets, phases, gradients."""

import math
import sys
import types

import pytest
import torch

import attnsieve
from attnsieve import reference
from cases import DTYPES, Case, cuda_only, qkv, randn
from layouts import build_layout
from numerics import assert_bitwise
from threshold_cases import PLAIN, decode_case, peaked_keys

attend = attnsieve.threshold_attention
BOTH = dict(return_lse=True, return_counters=True)


def problem(device, batch=2, heads=(4, 2), rows=130, length=700):
    dtype = DTYPES[device][0]
    q = randn((batch, heads[0], rows, 64), dtype, device)
    k = peaked_keys((batch, heads[1], length, 64), dtype, 1).to(device)
    return q, k, randn(k.shape, dtype, device, seed=2)


SHAPES = {"batch": (2, 1), "heads": (1, 4), "both": (2, 4)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_lambda_of_every_sequence_and_head(device, phase, shape):
    q, k, v = problem(device, rows=130 if phase == "prefill" else 1)
    table = 0.3 * torch.logspace(-1.5, 1.5, math.prod(SHAPES[shape])).view(SHAPES[shape])
    table = table.to(device)
    options = dict(skip_block=64, causal=True, **BOTH)
    if phase == "decode":
        options |= dict(phase="decode", num_splits=2)
    got = attend(q, k, v, table, **options)
    *want, counters = reference.threshold_attention(q, k, v, table, **options)
    assert_bitwise(got[2], counters, "counters")
    assert 0 < counters[..., 0].sum() < counters[..., 1].sum()
    bound = 2e-6 if q.dtype == torch.float32 else 2e-2
    for x, y in zip(got[:2], want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=bound, atol=bound)
    if shape != "both":
        assert_bitwise(attend(q, k, v, table.flatten(), **options), got, "one dimension")
    whole = table.expand(2, 4)
    assert_bitwise(attend(q, k, v, whole.contiguous(), **options), got, "two dimensions")


@pytest.mark.parametrize("layout", ["varlen", "paged"])
def test_lambda_of_heads_in_other_layouts(device, layout):
    dtype = DTYPES[device][0]
    case = Case(device, 130, 500, dtype=dtype, layout=layout, batch=3, causal=True, seed=5)
    layout = build_layout(case)
    layout.k *= 2
    table = torch.tensor([0.5, 4.0, 0.0, 1.0], device=device)
    out, counters = attend(*layout.args[:3], table, **layout.options, return_counters=True)
    for h, value in enumerate(table.tolist()):
        want = attend(*layout.args[:3], value, **layout.options, return_counters=True)
        heads = (slice(None), h)
        assert_bitwise((out[heads], counters[heads]), tuple(x[heads] for x in want), f"head {h}")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_one_dimension_that_could_be_either_is_refused(device, phase):
    q, k, v = problem(device, batch=4, rows=1)
    values = torch.full((4,), 0.3, device=device)
    with pytest.raises(ValueError, match=r"threshold: .*two dimensions, \[4, 1\] or \[1, 4\]"):
        attend(q, k, v, values, phase=phase)
    for table in (values[:, None], values[None], values[0]):
        assert_bitwise(attend(q, k, v, table, phase=phase), attend(q, k, v, 0.3, phase=phase))


@pytest.fixture
def calibrated(monkeypatch):
    """A stand-in for attnsieve.calibration: F = 1000 * sparsity, 10 times as much in decode."""

    class Calibration:
        def scale(self, phase, sparsity):
            return {"prefill": 1e3, "decode": 1e4}[phase] * sparsity

        @classmethod
        def load(cls, path):
            assert path == "some/file.json"
            return cls()

    module = types.ModuleType("attnsieve.calibration")
    module.Calibration = Calibration
    monkeypatch.setitem(sys.modules, "attnsieve.calibration", module)
    return Calibration()


def test_target_sparsity_is_lambda_over_the_length(device, calibrated):
    target = dict(target_sparsity=0.5, calibration=calibrated)
    q, k, v = problem(device)
    want = attend(q, k, v, 500.0 / 700, **BOTH)
    assert 0 < want[2][..., 0].sum() < want[2][..., 1].sum()
    assert_bitwise(attend(q, k, v, **target, **BOTH), want)
    by_path = dict(target, calibration="some/file.json")
    assert_bitwise(attend(q, k, v, **by_path, **BOTH), want)


@pytest.mark.parametrize("layout", ["varlen", "paged", "paged_varlen"])
def test_target_sparsity_takes_each_sequences_length(device, calibrated, layout):
    case = Case(device, 130, 500, dtype=DTYPES[device][0], layout=layout, batch=4, seed=3)
    layout = build_layout(case)
    options = layout.options
    lengths = options.get("seq_lens")
    if lengths is None:
        lengths = options["cu_seqlens_k"].diff()
    lambdas = (500.0 / lengths.clamp(min=1)).float()[:, None]
    target = dict(target_sparsity=0.5, calibration=calibrated, **BOTH)
    want = attend(*layout.args[:3], lambdas, **options, **BOTH)
    assert_bitwise(attend(*layout.args[:3], **target, **options), want)


@pytest.mark.parametrize("cache", [None, 16])
@pytest.mark.parametrize("two_phase", [False, True])
def test_target_sparsity_in_decode(device, calibrated, cache, two_phase):
    pick = dict(lengths=(1500, 300, 0), cache=cache, dtype=DTYPES[device][0])
    arguments, options, _ = decode_case(pick)
    q, k, v = (x.to(device) for x in arguments)
    options = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    options |= dict(num_splits=1, two_phase=two_phase, **BOTH)
    lambdas = torch.tensor([[500 / 1500], [500 / 300], [500.0]], device=device)
    target = dict(target_sparsity=0.05, calibration=calibrated)
    got = attend(q, k, v, **target, **options)
    assert_bitwise(got, attend(q, k, v, lambdas, **options))
    assert 0 < got[2][..., 0].sum() < got[2][..., 1].sum()


def test_splits():
    assert attnsieve.threshold_splits(1, 131072, 128) == 64  # 16 tiles each
    assert attnsieve.threshold_splits(1, 1000, 128) == 1
    assert attnsieve.threshold_splits(32, 131072, 128) == 32
    assert attnsieve.threshold_splits(64, 131072, 128) == 16
    assert attnsieve.threshold_splits(264, 131072, 128) == 4
    assert attnsieve.threshold_splits(300, 131072, 128) == 4 * 4  # 5 rounds of 264 for 4 x 300
    assert attnsieve.threshold_splits(528, 131072, 128) == 4
    assert attnsieve.threshold_splits(0, 0, 128) == 1
    for groups in (265, 280, 333, 400, 500, 1000):
        per = attnsieve.threshold_splits(groups, 131072, 128) // 4
        rounds = [-(-groups * n // 264) / n for n in range(1, 5)]
        assert rounds[per - 1] == min(rounds)


LAMBDA = 4.0  # of the gradient tests
GRADIENTS = dict(
    plain={},
    causal=dict(causal=True),
    window=dict(window=(100, 0)),
    sink=dict(sink=True),
    empty_rows=dict(causal=True, length=40),
    paged=dict(pages=True),
)


def gradient_case(name, dtype, rows=70):
    change = dict(GRADIENTS[name])
    length = change.pop("length", 260)
    q = randn((1, 2, rows, 8), dtype)
    k = peaked_keys((1, 1, length, 8), dtype, 1)
    v = randn(k.shape, dtype, seed=2)
    options = dict(skip_block=64) | change
    if options.pop("sink", False):
        options["sink"] = torch.tensor([0.5, -1.0])
    if options.pop("pages", False):
        k, v = (x[0].transpose(0, 1)[:256].reshape(16, 16, 1, 8).contiguous() for x in (k, v))
        pages = torch.randperm(16, generator=torch.Generator().manual_seed(0)).int()
        pages[3] = -1
        options |= dict(block_table=pages[None], seq_lens=torch.tensor([250]).int())
    return [x.requires_grad_() for x in (q, k, v)], options


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_the_oracle(name):
    """Central differences, with decisions far enough from the threshold to stay."""
    inputs, options = gradient_case(name, torch.float64)

    def run(*tensors):
        return reference.threshold_attention(*tensors, LAMBDA, **options, return_lse=True)

    out, lse, counters = reference.threshold_attention(*inputs, LAMBDA, **options, **BOTH)
    alive = lse.isfinite()  # an lse of -inf has no difference quotient
    assert counters[..., 0].sum() > 0 or name == "empty_rows"
    loss = [lambda *x: run(*x)[0], lambda *x: run(*x)[1][alive]]
    for function in loss:
        torch.autograd.gradcheck(function, inputs, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_prefill_are_the_oracles(name, dtype):
    inputs, options = gradient_case(name, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    results = attend(*inputs, LAMBDA, **options, **BOTH)
    want = reference.threshold_attention(*exact, LAMBDA, **options, **BOTH)
    assert results[0].dtype == dtype and results[1].dtype == torch.float32
    assert_bitwise(results[2], want[2], "counters")
    with torch.no_grad():
        plain = attend(*inputs, LAMBDA, **options, **BOTH)
    assert_bitwise(plain[2], results[2], "counters without gradients")
    bound = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0], plain[0], **bound)
    weights = randn(want[0].shape, seed=9)
    alive = results[1].isfinite()
    for one in (results, want):
        ((one[0] * weights).sum() + one[1][alive].sum()).backward()
    for x, y in zip(inputs, exact, strict=True):
        assert x.grad.isfinite().all() and (x.grad != 0).any()
        torch.testing.assert_close(x.grad, y.grad.to(dtype), **bound)


def test_skipped_keys_have_no_gradient():
    inputs, options = gradient_case("plain", torch.float32)
    inputs = [inputs[0].detach(), *inputs[1:]]
    out = attend(*inputs, math.inf, **options)  # tile 4 alone, keys 256 to 259
    out.sum().backward()
    for x in inputs[1:]:
        assert (x.grad[:, :, :256] == 0).all() and (x.grad[:, :, 256:] != 0).any()


def test_arguments_are_checked_where_gradients_are_asked_for():
    (q, k, v), _ = gradient_case("plain", torch.float32)
    with pytest.raises(ValueError, match="skip_block"):
        attend(q, k, v, 0.5, skip_block=100)
    with pytest.raises(ValueError, match="sink"):
        attend(q, k, v, 0.5, sink=torch.zeros(3))
    with pytest.raises(NotImplementedError, match="threshold: .*gradient"):
        attend(q, k, v, torch.tensor(0.5, requires_grad=True))


def test_no_gradients_in_decode():
    q, k, v = problem("cpu", rows=1)
    with pytest.raises(NotImplementedError, match="no backward kernel.*CPU tensors"):
        attend(q.requires_grad_(), k, v, 0.5, phase="decode")
    with torch.no_grad():
        attend(q, k, v, 0.5, phase="decode")


@cuda_only
def test_no_gradients_on_cuda():
    q, k, v = qkv("cuda", (1, 2, 70, 64), (1, 2, 70, 64))
    with pytest.raises(NotImplementedError, match="no backward kernel.*CPU tensors"):
        attend(q.requires_grad_(), k, v, 0.5)


PREFILL_MISTAKES = {
    "phase": dict(phase="both"),
    "two_phase": dict(two_phase=True),
    "num_splits": dict(num_splits=1),
    "k_scale": dict(k_scale=torch.ones(2)),
    "v_scale": dict(v_scale=torch.ones(2)),
    "target_sparsity": dict(threshold=None, target_sparsity=0.5),
    "calibration": dict(threshold=None, calibration="file"),
    "target_sparsity, calibration": dict(target_sparsity=0.5, calibration="file"),
    "return_counters": dict(threshold=None, return_counters=True),
}


@pytest.mark.parametrize("name", PREFILL_MISTAKES)
def test_bad_prefill_calls_name_the_argument(device, name):
    q, k, v = problem(device)
    with pytest.raises(ValueError, match=name):
        attend(q, k, v, **(dict(threshold=0.1) | PREFILL_MISTAKES[name]))


CU = torch.tensor([0, 1, 2]).int()
DECODE_MISTAKES = (
    ("index", dict(index=attnsieve.BlockIndex.from_dense(torch.ones(1, 6).bool(), 64, 128))),
    ("window", dict(window=(3, 0))),
    ("cu_seqlens_q", dict(cu_seqlens_q=CU)),
    ("cu_seqlens_k", dict(cu_seqlens_k=CU)),
    ("num_splits", dict(num_splits=0)),
    ("num_splits", dict(num_splits=129)),
    ("num_splits", dict(num_splits=129, threshold=None)),
    ("skip_block", dict(skip_block=100)),
    ("skip_block", dict(skip_block=32, two_phase=True)),
    ("two_phase", dict(threshold=None, two_phase=True)),
    ("return_counters", dict(threshold=None, return_counters=True)),
    ("threshold", dict(threshold=-0.1)),
    ("threshold", dict(threshold=math.nan, two_phase=True)),
    ("threshold", dict(threshold=torch.zeros(2, dtype=torch.float64))),
    ("threshold", dict(threshold=torch.zeros(1))),
    ("threshold", dict(threshold=torch.zeros(3))),
    ("threshold", dict(threshold=torch.zeros(2, 5))),
    ("threshold", dict(threshold=torch.zeros(4, 2))),
    ("threshold", dict(threshold=torch.zeros(1, 2, 4))),
    ("sink", dict(sink=torch.zeros(2))),
    ("k_scale", dict(k_scale=torch.ones(2))),
    ("k_scale", dict(k_scale=torch.ones(2), two_phase=True)),
    ("softmax_scale", dict(softmax_scale=0.0)),
    ("seq_lens", dict(seq_lens=torch.zeros(2).long())),
    ("seq_lens", dict(seq_lens=torch.tensor([701, 1]).int(), validate=True)),
    ("q", dict(q=torch.zeros(2, 4, 9, 64))),
    ("q", dict(q=torch.zeros(2, 4, 64))),
    ("q", dict(q=torch.zeros(2, 3, 1, 64))),
    ("k", dict(k=torch.zeros(2, 2, 700, 32))),
    ("k", dict(k=torch.zeros(2, 700, 64))),
    ("v", dict(v=torch.zeros(2, 2, 699, 64))),
)


@pytest.mark.parametrize("name, change", DECODE_MISTAKES)
def test_bad_decode_calls_name_the_argument(name, change):
    q, k, v = problem("cpu", rows=1)
    good = dict(q=q, k=k, v=v, threshold=0.1, phase="decode")
    attend(**good)
    with pytest.raises(ValueError, match=name):
        attend(**(good | change))


def test_wrong_types():
    q, k, v = problem("cpu", rows=1)
    with pytest.raises(TypeError, match="threshold"):
        attend(q, k, v, "0.1", phase="decode")
    with pytest.raises(TypeError, match="k: "):
        attend(q, None, v, 0.1)


def test_a_calibration_of_another_type(calibrated):
    q, k, v = problem("cpu")
    with pytest.raises(TypeError, match="calibration"):
        attend(q, k, v, target_sparsity=0.5, calibration=3)


@pytest.mark.parametrize("two_phase", [False, True])
def test_unsupported_decode_lists_the_supported_set(two_phase):
    x = torch.zeros(2, 2, 1, 12)
    with pytest.raises(NotImplementedError, match="head_dim"):
        attend(x, x, x, 0.1, phase="decode", two_phase=two_phase)


def test_float8_needs_its_scales():
    (q, k, v), options, _ = decode_case(dict(PLAIN, float8=True, lengths=(200, 3)))
    del options["v_scale"]
    for two_phase in (False, True):
        with pytest.raises(ValueError, match="v_scale"):
            attend(q, k, v, 0.1, two_phase=two_phase, **options)
