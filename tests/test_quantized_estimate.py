"""quantized_estimate_attention keeps what SALE's rule names, and attends exactly to it."""

import math

import pytest
import torch

import attnsieve
from attnsieve import reference
from attnsieve.methods.sale import SALE
from cases import DTYPES, pairwise, randn
from numerics import assert_bitwise

MASKS = {"none": {}, "causal": dict(causal=True), "window": dict(window=(150, 40))}


def marked_rule(bits, rows, keys, *, block_q, block_k, sink, local, diagonal, mask):
    """bool ``[B, H, nQ, nK]``: the visible blocks that are marked or forced."""
    columns = -(-keys // block_k)
    kept = (bits.unsqueeze(-1) >> torch.arange(32)) & 1
    kept = kept.flatten(-2)[..., :columns].bool()
    seen = torch.zeros(-(-rows // block_q) * block_q, columns * block_k, dtype=torch.bool)
    seen[:rows, :keys] = reference.visible_mask(rows, keys, **mask)
    seen = seen.unflatten(0, (-1, block_q)).unflatten(2, (-1, block_k)).any(3).any(1)
    kept = kept.clone()
    kept[..., :sink] = True
    for row in range(kept.shape[2]):
        own = torch.arange(row * block_q, min((row + 1) * block_q, rows)) + keys - rows
        own = own[(own >= 0) & (own < keys)] // block_k
        if len(own) == 0:
            continue
        kept[:, :, row, max(0, int(own[0]) - local) : int(own[0])] |= local > 0
        if diagonal:
            kept[:, :, row, own] = True
    return kept & seen


MARKED = pairwise(
    lengths=((64, 64), (200, 333), (300, 70), (129, 2500)),
    block_q=(64, 128),
    block_k=(16, 32, 64, 128),
    sink=(0, 1, 3),
    local=(0, 2),
    diagonal=(False, True),
    mask=tuple(MASKS),
    density=(0.0, 0.1, 1.0),
)


@pytest.mark.parametrize("pick", MARKED, ids=[str(i) for i in range(len(MARKED))])
def test_select_marked(device, pick):
    (rows, keys), block_q, block_k = pick["lengths"], pick["block_q"], pick["block_k"]
    columns = (keys + block_k - 1) // block_k
    shape = (2, 3, (rows + block_q - 1) // block_q, (columns + 31) // 32, 32)
    random = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < pick["density"]
    words = (random.long() << torch.arange(32)).sum(-1)
    bits = torch.where(words >= 2**31, words - 2**32, words).int()
    mask = MASKS[pick["mask"]]
    forced = {n: pick[n] for n in ("sink", "local", "diagonal")}
    index = attnsieve.select_marked(
        bits.to(device),
        rows,
        keys,
        block_q=block_q,
        block_k=block_k,
        sink_blocks=pick["sink"],
        local_blocks=pick["local"],
        diagonal=pick["diagonal"],
        **mask,
    )
    index.validate(columns)
    want = marked_rule(bits, rows, keys, block_q=block_q, block_k=block_k, mask=mask, **forced)
    assert torch.equal(index.counts.cpu().long(), want.sum(-1))
    found = torch.zeros_like(want)
    for at in torch.nonzero(index.counts.cpu() > 0).tolist():
        count = int(index.counts[tuple(at)])
        found[(*at, index.columns[tuple(at)][:count].cpu().long())] = True
    assert torch.equal(found, want)


def test_select_marked_packed(device):
    """Lists of a packed batch are those of its sequences alone."""
    lengths = ((200, 333), (0, 50), (64, 0), (300, 300))
    cu = [
        torch.tensor([0, *x], dtype=torch.int32).cumsum(0).int() for x in zip(*lengths, strict=True)
    ]
    shape = (4, 2, 5, 1)
    bits = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(1)).int()
    options = dict(sink_blocks=1, local_blocks=1, diagonal=True, causal=True, block_k=32)
    index = attnsieve.select_marked(
        bits.to(device),
        300,
        333,
        cu_seqlens_q=cu[0].to(device),
        cu_seqlens_k=cu[1].to(device),
        **options,
    )
    for b, (rows, keys) in enumerate(lengths):
        blocks, words = -(-rows // 64), (-(-keys // 32) + 31) // 32
        own = bits[b : b + 1, :, :blocks, :words].contiguous().to(device)
        alone = attnsieve.select_marked(own, rows, keys, **options)
        assert torch.equal(index.counts[b, :, :blocks], alone.counts[0])
        assert not index.counts[b, :, blocks:].any()
        room = alone.columns.shape[3]
        assert torch.equal(index.columns[b, :, :blocks, :room], alone.columns[0])
        assert (index.columns[b, :, :, room:] == -1).all()


@pytest.mark.parametrize("capacity", [0, 2, 5, 9, 40, 99])
def test_select_marked_with_little_room(device, capacity):
    """Sink blocks stay, then the last ones; rows that fit are as with all the room."""
    bits = torch.randint(-(2**31), 2**31, (2, 3, 10, 2), generator=torch.Generator().manual_seed(1))
    options = dict(block_k=16, sink_blocks=3, diagonal=True, causal=True)
    bits = bits.int().to(device)
    whole = attnsieve.select_marked(bits, 600, 640, **options)
    index = attnsieve.select_marked(bits, 600, 640, capacity=capacity, **options)
    assert index.columns.shape[3] == min(capacity, 40)
    for at in torch.cartesian_prod(*map(torch.arange, index.counts.shape)).tolist():
        kept = whole.columns[tuple(at)][: int(whole.counts[tuple(at)])].tolist()
        if len(kept) > capacity:
            sinks = [block for block in kept if block < 3][:capacity]
            last = capacity - len(sinks)
            kept = sinks + (kept[-last:] if last else [])
        assert index.columns[tuple(at)][: int(index.counts[tuple(at)])].tolist() == kept
    assert bool((whole.counts > capacity).any()) == (capacity < 20) or capacity > 20


def near_keys(rows, keys, block_q, block_k, sink, local):
    """bool ``[Sq, Sk]``: what a row sees of sink and local blocks."""
    near = torch.zeros(rows, keys, dtype=torch.bool)
    near[:, : -(-sink // block_k) * block_k] = True
    for begin in range(0, rows, block_q):
        first = (begin + keys - rows) // block_k
        first -= -(-(local - block_q) // block_k)
        near[begin : begin + block_q, max(0, first) * block_k :] = True
    return near & reference.visible_mask(rows, keys, causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_q, block_k", [(64, 32), (128, 16), (64, 64)])
@pytest.mark.parametrize("row_stride", [1, 4])
@pytest.mark.parametrize("bits", [4, 8])
def test_keeps_what_the_rule_names(device, dtype, block_q, block_k, row_stride, bits):
    """The published formula in float64, on the same codes."""
    if dtype not in DTYPES[device]:
        pytest.skip(f"{dtype} is not computed on {device}")
    heads, kv_heads, rows, dim, tau = 4, 2, 900, 64, 1.2
    q, k, v = (
        2 * randn((1, h, rows, dim), torch.float32, seed=s).to(dtype)
        for h, s in ((heads, 1), (kv_heads, 2), (kv_heads, 3))
    )
    k = k + 3 * randn((dim,), torch.float32, seed=4).to(dtype)  # a mean that smoothing removes
    sizes = dict(block_q=block_q, block_k=block_k)
    index = attnsieve.select_estimated(
        *(x.to(device) for x in (q, k, v)), tau=tau, bits=bits, row_stride=row_stride, **sizes
    )
    index.validate((rows + block_k - 1) // block_k)
    coded_q = attnsieve.quantize_blocks(q, smooth=False)
    coded_k = attnsieve.quantize_blocks(k, bits=bits, scale_rows="key_quads")
    near = near_keys(rows, rows, block_q, block_k, 32, 256)
    seen = reference.visible_mask(rows, rows, causal=True)
    seen = seen & (torch.arange(rows) % row_stride == 0)[:, None]
    columns = -(-rows // block_k)
    unsure = 0
    for head in range(heads):
        kv = head // (heads // kv_heads)
        smooth = (k[0, kv] - coded_k.mean[0, kv]).to(dtype)
        exact = q[0, head].double() @ smooth.double().T * dim**-0.5
        lse = exact.masked_fill(~near, -math.inf).logsumexp(-1)
        scales = coded_k.scales[0, kv].double()
        row = torch.arange(rows)
        of_key = scales[row // 32 * 4 + row % 8 // 2]
        estimate = coded_q.unpacked()[0, head].double() @ coded_k.unpacked()[0, kv].double().T
        estimate = estimate * coded_q.scales[0, head].double()[:, None] * of_key * dim**-0.5
        margin = (estimate - lse[:, None] - math.log(tau)).masked_fill(~seen, -math.inf)
        pad = (0, columns * block_k - rows, 0, -rows % block_q)
        margin = torch.nn.functional.pad(margin, pad, value=-math.inf)
        margin = margin.unflatten(0, (-1, block_q)).unflatten(2, (-1, block_k)).amax((1, 3))
        forced = torch.nn.functional.pad(near, pad)
        forced = forced.unflatten(0, (-1, block_q)).unflatten(2, (-1, block_k)).any(3).any(1)
        want = (margin > 0) | forced
        found = torch.zeros_like(want)
        for r, count in enumerate(index.counts[0, head].tolist()):
            found[r, index.columns[0, head, r, :count].cpu().long()] = True
        clear = forced | (margin.abs() > 1e-3)
        assert torch.equal(found[clear], want[clear])
        unsure += int((~clear).sum())
        kept = float(found.sum() / (margin > -math.inf).sum())
        assert 0.2 < kept < 0.95, "the case decides too little"
    assert unsure < 20


def test_attends_to_its_index_and_says_which(device):
    q, k, v = (randn((2, h, 300, 64), DTYPES[device][0], seed=h).to(device) for h in (4, 2, 2))
    options = dict(tau=0.3, block_k=16, local_tokens=64)
    out, lse, index = attnsieve.quantized_estimate_attention(
        q, k, v, return_lse=True, return_index=True, **options
    )
    want = attnsieve.block_sparse_attention(q, k, v, index, causal=True, return_lse=True)
    assert_bitwise((out, lse), want, "over its index")
    assert_bitwise(SALE(**options)(q, k, v, causal=True), out, "the method")
    everything = attnsieve.quantized_estimate_attention(q, k, v, **(options | dict(tau=0.0)))
    dense = attnsieve.block_sparse_attention(q, k, v, causal=True)
    torch.testing.assert_close(everything, dense, rtol=2e-2, atol=2e-2)


def test_tau_of_each_head(device):
    q, k, v = (randn((1, h, 500, 64), DTYPES[device][0], seed=h).to(device) for h in (4, 2, 2))
    taus = torch.tensor([0.0, 0.02, 0.2, 1e9], device=device)
    index = attnsieve.select_estimated(q, k, v, tau=taus, local_tokens=64)
    counts = index.counts[0].sum(-1)
    assert (counts[:-1] >= counts[1:]).all() and counts[0] > counts[-1]
    for head, tau in enumerate(taus.tolist()):
        own = attnsieve.select_estimated(q, k, v, tau=tau, local_tokens=64)
        assert torch.equal(own.counts[:, head], index.counts[:, head])


def test_packed_sequences_are_estimated_alone(device):
    dtype = DTYPES[device][0]
    lengths = (300, 70, 0, 520)
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    q, k, v = (2 * randn((int(cu[-1]), h, 64), dtype, seed=h).to(device) for h in (4, 2, 2))
    cu_there = cu.to(device)
    packed = dict(cu_seqlens_q=cu_there, cu_seqlens_k=cu_there, max_seqlen_q=520, max_seqlen_k=520)
    options = dict(block_k=16, local_tokens=64, sink_tokens=16, row_stride=2)
    asked = dict(return_lse=True, return_index=True)
    out, lse, index = attnsieve.quantized_estimate_attention(
        q, k, v, tau=20.0, **asked, **packed, **options
    )
    kept, all_blocks = 0, 0
    for b, length in enumerate(lengths):
        rows = slice(int(cu[b]), int(cu[b]) + length)
        own = [x[rows].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        if length == 0:
            assert not index.counts[b].any()
            continue
        alone, alone_lse, alone_index = attnsieve.quantized_estimate_attention(
            *own, tau=20.0, **asked, **options
        )
        blocks, room = alone_index.columns.shape[2:]
        # Codes are bitwise the same; the log-sum-exps they are compared with nearly.
        same = (index.columns[b, :, :blocks, :room] == alone_index.columns[0]).all(-1)
        assert same.float().mean() > 0.95
        same = same.repeat_interleave(64, 1)[:, :length]
        tolerance = dict(rtol=1e-4, atol=1e-4) if device == "cpu" else dict(rtol=2e-2, atol=2e-2)
        found, wanted = out[rows].transpose(0, 1)[same], alone[0][same]
        torch.testing.assert_close(found, wanted, **tolerance)
        torch.testing.assert_close(lse[rows].T[same], alone_lse[0][same], **tolerance)
        kept += int(alone_index.counts.sum())
        all_blocks += int(attnsieve.select_estimated(*own, tau=0.0, **options).counts.sum())
    assert 0.3 * all_blocks < kept < 0.9 * all_blocks, "the case decides too little"


@pytest.mark.parametrize("key_pool", [2, 4])
def test_pooled_keys_are_estimated_by_their_mean(device, key_pool):
    """Equal neighbours: pooling them loses nothing."""
    q = 2 * randn((1, 4, 512, 64), DTYPES[device][0], seed=1).to(device)
    k = 2 * randn((1, 2, 512 // key_pool, 64), DTYPES[device][0], seed=2).to(device)
    k = k.repeat_interleave(key_pool, 2)
    options = dict(tau=0.6, bits=8, block_k=64, local_tokens=64)
    whole, pooled = (
        attnsieve.select_estimated(q, k, k, key_pool=pool, **options) for pool in (1, key_pool)
    )
    same = (whole.to_dense(8) == pooled.to_dense(8)).float().mean()
    assert same > 0.98  # scales belong to other groups of keys
    assert 0.1 < float((whole.counts - 2).clamp(min=0).sum() / whole.counts.sum())


def test_projection_to_everything_changes_little(device):
    q, k = (2 * randn((1, h, 512, 64), DTYPES[device][0], seed=h).to(device) for h in (4, 2))
    basis = torch.linalg.qr(randn((2, 64, 64), torch.float32, seed=3))[0].to(device)
    options = dict(tau=0.6, bits=8, block_k=64, local_tokens=64)
    whole = attnsieve.select_estimated(q, k, k, **options)
    turned = attnsieve.select_estimated(q, k, k, projection=basis, **options)
    assert (whole.to_dense(8) == turned.to_dense(8)).float().mean() > 0.97


def test_projection_finds_what_lies_in_its_span(device):
    """Keys differ in 64 of 128 dimensions: half of the work says the same."""
    q, k = (2 * randn((1, h, 512, 128), torch.float32, seed=h) for h in (4, 2))
    k[..., 64:] = 0
    q, k = (x.to(DTYPES[device][0]).to(device) for x in (q, k))
    basis = torch.eye(128, 64, device=device).expand(2, 128, 64)
    options = dict(tau=0.6, bits=8, block_k=64, local_tokens=64)
    whole = attnsieve.select_estimated(q, k, k, **options)
    narrow = attnsieve.select_estimated(q, k, k, projection=basis, **options)
    assert (whole.to_dense(8) == narrow.to_dense(8)).float().mean() > 0.98
    wrong = attnsieve.select_estimated(q, k, k, projection=basis.flip(1), **options)
    assert wrong.counts.sum() < 0.8 * whole.counts.sum()


def test_density_is_the_kept_share(device):
    q, k, v = (randn((1, h, 300, 64), DTYPES[device][0], seed=h).to(device) for h in (4, 2, 2))
    options = dict(tau=0.3, block_k=16, local_tokens=64)
    _, index, density = attnsieve.quantized_estimate_attention(
        q, k, v, return_index=True, return_density=True, **options
    )
    seen = reference.visible_mask(300, 300, causal=True)
    kept = index.to_dense(19).cpu().repeat_interleave(64, 2)[:, :, :300]
    kept = kept.repeat_interleave(16, 3)[..., :300] & seen
    assert float(density) == pytest.approx(float(kept.sum() / (4 * seen.sum())))


@pytest.mark.parametrize(
    "tau",
    [-0.1, math.nan, torch.ones(3), torch.ones(4, dtype=torch.float64), torch.ones(1, 4)],
    ids=["negative", "nan", "three", "float64", "two dims"],
)
def test_bad_tau_is_named(tau):
    q = torch.zeros(1, 4, 64, 64)
    with pytest.raises(ValueError, match="tau: expected"):
        attnsieve.select_estimated(q, q, q, tau=tau)


@pytest.mark.parametrize("given", ["cu_seqlens_q", "cu_seqlens_k"])
def test_packed_sequences_need_the_offsets_of_both(given):
    q = torch.zeros(64, 1, 64)
    offsets = torch.tensor([0, 64], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q, cu_seqlens_k: must be given together"):
        attnsieve.select_estimated(q, q, q, tau=0.1, **{given: offsets})


def test_windows_are_refused():
    q = torch.zeros(1, 1, 64, 64)
    with pytest.raises(NotImplementedError, match="window"):
        SALE(0.1).select(q, q, causal=True, window=(5, 5))
