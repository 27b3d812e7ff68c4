"""quantize_blocks is, bit for bit, what its NumPy oracle says, on every backend."""

import math

import pytest
import torch

import attnsieve
from attnsieve import reference
from cases import DTYPES, pairwise, randn
from layouts import offsets
from numerics import assert_bitwise

NAN, INF = math.nan, math.inf
SCALE_ROWS = (1, 2, 16, 64, 128, "query_pairs", "key_quads")
LENGTHS = ((1,), (16, 0, 33), (128, 7), (129, 300), (2100,))

CASES = pairwise(
    dtype=DTYPES["cpu"],
    bits=(8, 4),
    scale_rows=SCALE_ROWS,
    smooth=(True, False),
    head_dim=(32, 64, 96, 256),
    lengths=LENGTHS,
    packed=(False, True),
    bshd=(False, True),
)


def build(pick, seed=0):
    """``(x, options)``: columns with means of their own, rows of very different size."""
    lengths, heads, dim = pick["lengths"], 2, pick["head_dim"]
    rows = sum(lengths) if pick["packed"] else max(lengths)
    shape = (rows, heads, dim) if pick["packed"] else (len(lengths), heads, rows, dim)
    x = randn(shape, torch.float32, seed=seed)
    x = x * 2.0 ** torch.randint(-8, 8, (*shape[:-1], 1), generator=torch.manual_seed(seed))
    x = (x + 3 * randn((dim,), torch.float32, seed=seed + 1)).to(pick["dtype"])
    if pick["bshd"]:
        x = x.transpose(-3, -2).contiguous().transpose(-3, -2)
    options = dict(bits=pick["bits"], scale_rows=pick["scale_rows"], smooth=pick["smooth"])
    if pick["packed"]:
        options["cu_seqlens"] = offsets(lengths, "cpu")
    return x, options


def run(device, x, options):
    """On the device, its results as the oracle returns them."""
    there = {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    own = x.to(device).as_strided(x.shape, x.stride()) if x.is_contiguous() else x.to(device)
    found = attnsieve.quantize_blocks(own, return_smoothed=options.get("smooth", True), **there)
    mean = None if found.mean is None else found.mean.cpu()
    smoothed = None if found.smoothed is None else found.smoothed.cpu()
    return found.unpacked().cpu(), found.scales.cpu(), mean, smoothed


def smoothed_rows(x, mean, cu_seqlens=None):
    """x less the mean of its sequence, rounded once."""
    if cu_seqlens is None:
        return (x.float() - mean[:, :, None]).to(x.dtype)
    lengths = torch.tensor(cu_seqlens.tolist()).diff()
    return (x.float() - mean.repeat_interleave(lengths, 0)).to(x.dtype)


def check(device, x, options, what):
    codes, scales, mean, smoothed = run(device, x, options)
    want_codes, want_scales, want_mean = reference.quantize_blocks(x, **options)
    if mean is not None:
        assert_bitwise(mean, want_mean, f"mean of {what}")
        want = smoothed_rows(x, want_mean, options.get("cu_seqlens"))
        assert_bitwise(smoothed, want, f"smoothed rows of {what}")
    assert_bitwise(scales, want_scales, f"scales of {what}")
    assert_bitwise(codes, want_codes, f"codes of {what}")
    return codes, scales


@pytest.mark.parametrize("pick", CASES, ids=[str(i) for i in range(len(CASES))])
def test_equals_the_oracle(device, pick):
    x, options = build(pick)
    codes, scales = check(device, x, options, pick)
    if pick["lengths"] != (1,) or not pick["smooth"]:  # one row is its own mean
        assert codes.abs().max() == 2 ** (pick["bits"] - 1) - 1
    assert (scales >= 0).all()


def test_mean_over_three_levels_of_sums(device):
    """More rows than 128 x 128; a mean that float32 in another order would round differently."""
    x = randn((1, 1, 17000, 8), torch.float32) + 1000
    codes, _, mean, _ = run(device, x, dict(scale_rows=128))
    _, _, want = reference.quantize_blocks(x, scale_rows=128)
    assert_bitwise(mean, want, "mean")
    exact = x.double().mean(2)
    assert ((mean - exact).abs() / exact).max() < 2e-7
    assert not torch.equal(mean, x.flip(2).cumsum(2)[:, :, -1] / 17000)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_within_half_a_step(device, bits):
    x = randn((2, 3, 200, 64), torch.bfloat16)
    found = attnsieve.quantize_blocks(x.to(device), bits=bits, scale_rows=64)
    y = x.double() - found.mean.cpu().double()[:, :, None]
    step = found.scales.cpu().double().repeat_interleave(64, 2)[:, :, :200, None]
    error = (y - found.unpacked().cpu() * step).abs()
    assert (error <= 0.5 * step * (1 + 1e-5)).all()
    assert (error > 0.45 * step).any()  # and no better than that


@pytest.mark.parametrize("scale_rows", SCALE_ROWS)
def test_scales_belong_to_their_rows(device, scale_rows):
    """One large number changes the scale of the rows it shares it with, and of no others."""
    x = randn((1, 1, 128, 32), torch.float32).clamp(-2, 2)
    row = 45
    mates = {
        "query_pairs": {37, 45},
        "key_quads": {36, 37, 44, 45, 52, 53, 60, 61},
    }.get(scale_rows)
    if mates is None:
        mates = set(range(row // scale_rows * scale_rows, (row // scale_rows + 1) * scale_rows))
    options = dict(scale_rows=scale_rows, smooth=False)
    before, *_ = run(device, x, options)
    x[0, 0, row, 3] = 64.0
    after, *_ = run(device, x, options)
    changed = set(torch.nonzero((before != after).any(-1)[0, 0]).flatten().tolist())
    assert changed == mates
    assert int(after[0, 0, row, 3]) == 127


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES["cpu"])
@pytest.mark.parametrize("smooth", [False, True])
def test_special_numbers(device, bits, dtype, smooth):
    """Zeros, denormal numbers, the greatest, infinities and NaN stay within their scale."""
    x = randn((1, 1, 320, 32), torch.float32).to(dtype)
    tiny = torch.finfo(dtype).smallest_normal
    x[0, 0, :32] = 0
    x[0, 0, 32:64] = x[0, 0, 32:64].sign() * tiny / 4
    x[0, 0, 64:96] *= torch.finfo(dtype).max / 1024  # whose sums are finite too
    x[0, 0, 96, 5] = INF
    x[0, 0, 128, 6] = -INF
    x[0, 0, 160, 7] = NAN
    x[0, 0, 200:202] = -0.0
    options = dict(bits=bits, scale_rows=32, smooth=smooth)
    codes, scales = check(device, x, options, "special numbers")
    bad = torch.isnan(scales[0, 0])
    assert bad[3:6].all() and not bad[6:].any() and not bad[:2].any()
    assert not codes[0, 0, 96:192].any()
    if not smooth:
        assert scales[0, 0, 0] == 0 and not codes[0, 0, :32].any()
        is_zero = tiny / 4 < 2.0**-119
        assert (scales[0, 0, 1] == 0) == is_zero and (codes[0, 0, 32:64] == 0).all() == is_zero


def test_packed_codes_have_the_documented_order(device):
    x = randn((1, 1, 3, 64), torch.float32)
    eight = attnsieve.quantize_blocks(x.to(device) * 7, bits=4, smooth=False)
    codes = eight.unpacked().cpu()[0, 0]
    packed = eight.codes.cpu()[0, 0].int()
    for segment in range(2):
        for i in range(16):
            byte = packed[:, segment * 16 + i]
            upper, lower = codes[:, segment * 32 + i], codes[:, segment * 32 + 16 + i]
            assert torch.equal(byte, (upper.int() & 15) * 16 + (lower.int() & 15))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [0, 1])
def test_empty(device, packed, rows):
    shape = (rows, 2, 32) if packed else (0 if rows else 3, 2, rows, 32)
    options = dict(cu_seqlens=torch.tensor([0, 0, rows], dtype=torch.int32)) if packed else {}
    check(device, torch.ones(shape), options, "empty")
    assert attnsieve.quantize_blocks(torch.ones(2, 0, 5, 32, device=device)).codes.numel() == 0


def test_other_sequences_do_not_matter(device):
    """Batched, packed and alone: the same codes; bad offsets stay inside the tensors."""
    lengths = (100, 0, 37, 260)
    parts = [randn((n, 2, 64), torch.bfloat16, seed=n) for n in lengths]
    packed = torch.cat(parts).to(device)
    found = attnsieve.quantize_blocks(
        packed, scale_rows="key_quads", cu_seqlens=offsets(lengths, device)
    )
    begin = 0
    for b, part in enumerate(parts):
        alone = attnsieve.quantize_blocks(
            part.transpose(0, 1)[None].to(device), scale_rows="key_quads"
        )
        own = found.codes[begin : begin + len(part)].transpose(0, 1)
        assert_bitwise(own, alone.codes[0], f"codes of {b}")
        assert_bitwise(found.mean[b], alone.mean[0], f"mean of {b}")
        first = (begin // 32 + b) * 4
        count = alone.scales.shape[-1]
        assert_bitwise(found.scales[:, first : first + count], alone.scales[0], f"scales of {b}")
        begin += len(part)
    bad = torch.tensor([0, 2**31 - 1, -5, 90, 397], dtype=torch.int32, device=device)
    attnsieve.quantize_blocks(packed, cu_seqlens=bad)


MISTAKES = {
    "rank": ("x", lambda x: dict(x=x[0])),
    "strides": ("x", lambda x: dict(x=x.transpose(2, 3))),
    "bits": ("bits", lambda x: dict(bits=5)),
    "block": ("scale_rows", lambda x: dict(scale_rows=3)),
    "fragment": ("scale_rows", lambda x: dict(scale_rows="rows")),
    "smoothed": ("return_smoothed", lambda x: dict(smooth=False, return_smoothed=True)),
    "offsets": ("cu_seqlens", lambda x: dict(x=x[0], cu_seqlens=torch.zeros(2, device=x.device))),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_arguments_are_named(device, mistake):
    name, change = MISTAKES[mistake]
    x = torch.ones(1, 2, 40, 64, device=device)
    arguments = dict(x=x) | change(x)
    with pytest.raises((ValueError, RuntimeError), match=name):
        attnsieve.quantize_blocks(arguments.pop("x"), **arguments)


def test_unsupported_is_refused(device):
    with pytest.raises(NotImplementedError, match="head_dim"):
        attnsieve.quantize_blocks(torch.ones(1, 1, 4, 260, device=device))
    with pytest.raises(NotImplementedError, match="dtype"):
        attnsieve.quantize_blocks(torch.ones(1, 1, 4, 64, device=device).double())
    with pytest.raises(ValueError, match="multiple of 32"):
        attnsieve.quantize_blocks(torch.ones(1, 1, 4, 40, device=device), bits=4)
