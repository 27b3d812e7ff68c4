"""Offsets above 2**31 and long grids. Only the rows past the boundary and the last one are checked.

Slow, and guarded by the memory they need.
"""

import os

import pytest
import torch

import attnsieve
from attnsieve import BlockIndex
from cases import DTYPES, cuda_only, randn
from numerics import assert_bitwise

pytestmark = pytest.mark.slow
attend = attnsieve.block_sparse_attention


def need_gib(device, gib):
    if device == "cpu":
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB free on {device}, found {free / 2**30:.1f}")


def compare_parts(device, q, k, v, parts, **options):
    """``attend`` on the whole equals ``attend`` on copies of single (batch, head) problems."""
    out, lse = attend(q, k, v, return_lse=True, **options)
    for b, h in parts:
        kv_head = h // (q.shape[1] // k.shape[1])
        one = q[b : b + 1, h : h + 1].clone()
        keys = [x[b : b + 1, kv_head : kv_head + 1].clone() for x in (k, v)]
        expected = attend(one, *keys, return_lse=True, **options)
        actual = out[b : b + 1, h : h + 1], lse[b : b + 1, h : h + 1]
        assert_bitwise(actual, expected, f"batch {b}, head {h} on {device}")


def test_queries_and_out_above_2g_elements(device):
    """8200 x 32 x 128 x 64: batch 8192 starts at 2**31."""
    need_gib(device, 14)
    dtype = DTYPES[device][-1]
    q = torch.zeros(8200, 32, 128, 64, dtype=dtype, device=device)
    q[8190:] = randn((10, 32, 128, 64), dtype, device)
    k = randn((8200, 1, 2, 64), dtype, device, 1)
    parts = [(8191, 31), (8192, 0), (8199, 31)]
    compare_parts(device, q, k, k, parts)


def test_keys_above_2g_elements(device):
    need_gib(device, 14)
    dtype = DTYPES[device][-1]
    k = torch.zeros(8200, 32, 128, 64, dtype=dtype, device=device)
    k[8190:] = randn((10, 32, 128, 64), dtype, device)
    q = randn((8200, 32, 1, 64), dtype, device, 1)
    compare_parts(device, q, k, k, [(8191, 31), (8192, 0), (8199, 31)])


def test_pages_above_2g_elements(device):
    """A cache of 2**31 elements and 16 pages: the first table entry lies past the boundary."""
    need_gib(device, 14)
    dtype = DTYPES[device][-1]
    cache = torch.zeros(2**31 // (64 * 8 * 64) + 16, 64, 8, 64, dtype=dtype, device=device)
    cache[-16:] = randn((16, 64, 8, 64), dtype, device)
    last = cache.shape[0] - 1
    table = torch.tensor([[last, last - 15, 0], [last - 3, last - 8, last]], device=device).int()
    seq_lens = torch.tensor([128, 170], device=device).int()
    q = randn((2, 8, 70, 64), dtype, device, 1)
    actual = attend(q, cache, cache, block_table=table, seq_lens=seq_lens, return_lse=True)
    small = cache[-16:].clone()
    expected = attend(
        q, small, small, block_table=table - (last - 15), seq_lens=seq_lens, return_lse=True
    )
    assert_bitwise(actual, expected, "pages past 2**31 elements")


def test_row_strides_above_2g_elements(device):
    """Two rows almost 2**31 elements apart, and a head stride beyond it."""
    need_gib(device, 10)
    dtype = DTYPES[device][-1]
    storage = torch.empty(2**31 + 2**12, dtype=dtype, device=device)
    far = storage.as_strided((1, 2, 2, 64), (0, 2**31 + 256, 128, 1))
    far.copy_(randn((1, 2, 2, 64), dtype, device))
    near = far.contiguous()
    assert_bitwise(attend(far, far, far), attend(near, near, near), "far heads")


@pytest.mark.parametrize("where", ["batch", "heads", "blocks"])
@pytest.mark.parametrize("count", [65535, 65536, 65537])
def test_grid_limits(device, where, count):
    need_gib(device, 6)
    dtype = DTYPES[device][-1]
    batch, heads, rows = {
        "batch": (count, 1, 1),
        "heads": (1, count, 1),
        "blocks": (1, 1, count * 64 if device == "cuda" else count),
    }[where]
    q = randn((batch, heads, rows, 64), dtype, device)
    k = randn((batch, 1, 70, 64), dtype, device, 1)
    out, lse = attend(q, k, k, return_lse=True)
    tail = q[-1:, -1:, -1:].clone(), k[-1:].clone(), k[-1:].clone()
    expected = attend(*tail, return_lse=True)
    assert_bitwise((out[-1:, -1:, -1:], lse[-1:, -1:, -1:]), expected, f"last of {count} {where}")


def test_one_million_keys(device):
    need_gib(device, 4)
    dtype = DTYPES[device][-1]
    seqlen_k = 1_048_576 if device == "cuda" else 262_144
    q = randn((1, 1, 64, 64), dtype, device)
    k = randn((1, 1, seqlen_k, 64), dtype, device, 1)
    v = torch.ones_like(k)
    out, lse = attend(q, k, v, return_lse=True)
    scores = q[0, 0].double() @ k[0, 0].double().T / 8
    torch.testing.assert_close(lse[0, 0].double(), scores.logsumexp(1), rtol=0, atol=1e-4)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=2**-8)


@cuda_only
def test_index_above_2g_entries():
    """columns of 2**31 + entries: 64 lists of 8192 rows with room for 4100 ids."""
    need_gib("cuda", 20)
    rows, capacity, heads = 8192, 4100, 64
    columns = torch.full((1, heads, rows, capacity), -1, dtype=torch.int32, device="cuda")
    assert columns.numel() > 2**31
    columns[..., 0] = torch.arange(rows, device="cuda", dtype=torch.int32) % 2
    counts = torch.ones(1, heads, rows, dtype=torch.int32, device="cuda")
    q = randn((1, heads, rows * 64, 64), torch.bfloat16, "cuda")
    k = randn((1, 1, 128, 64), torch.bfloat16, "cuda", 1)
    out = attend(q, k, k, BlockIndex(counts, columns, 64, 64))
    for row in (0, rows - 2, rows - 1):
        block = slice(row * 64, row * 64 + 64)
        half = k[:, :, 64 * (row % 2) :][:, :, :64].contiguous()
        expected = attend(q[:, -1:, block].contiguous(), half, half)
        assert_bitwise(out[:, -1:, block], expected, f"row {row} of the last list")


def test_caches_above_2g_elements(device):
    """append_kv, proxy_scores and decode over two pages more than 2**31 elements apart."""
    # What lies between the pages is never touched; the CPU never backs it with memory.
    need_gib(device, 1 if device == "cpu" else 9)
    make = dict(dtype=torch.float16, device=device)
    far = [torch.empty(2**31 + 2**13, **make) for _ in range(2)]
    far = [x.as_strided((2, 16, 2, 64), (2**31 + 2048, 128, 64, 1)) for x in far]
    near = [torch.zeros(2, 16, 2, 64, **make) for _ in range(2)]
    shapes = ((2, 27), (2, 28), (4, 1))
    k, v, q = (randn((1, h, n, 64), seed=h + n, **make) for h, n in shapes)
    where = dict(
        block_table=torch.tensor([[1, 0]], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([27], dtype=torch.int32, device=device),
    )
    results = []
    for caches in (far, near):
        bounds = torch.zeros(2, 2, 2, 64, **make)
        attnsieve.append_kv(k, v[:, :, 1:], *caches, bounds=bounds, **where)
        scores = attnsieve.proxy_scores(q, caches[0], **where)
        results.append((bounds, scores, attnsieve.decode(q, *caches, **where)))
    assert_bitwise(*results, "pages 2**31 elements apart")
    assert_bitwise(far[0][1], k[0, :, :16].transpose(0, 1))


def test_decode_of_one_million_keys(device):
    """Everything, and the 4096 tokens that score best of 2**20."""
    need_gib(device, 4)
    dtype, keys = DTYPES[device][-1], 1_048_576
    q, k = randn((1, 4, 1, 64), dtype, device), randn((1, 2, keys, 64), dtype, device, 1)
    v = randn((1, 2, keys, 64), dtype, device, 2)
    scores = torch.einsum("hqd,hkd->hqk", q[0].double().view(2, 2, 64), k[0].double()) / 8
    out, lse = attnsieve.decode(q, k, v, return_lse=True)
    bounds = dict(rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse[0].double().view(2, 2), scores.logsumexp(-1), rtol=0, atol=1e-4)
    wanted = scores.softmax(-1) @ v[0].double()
    torch.testing.assert_close(out[0].double().view(2, 2, 64), wanted, **bounds)
    ranked = scores.amax(1).float()[None]
    best = attnsieve.select_topk(ranked, 4096)
    kept = ranked.gather(-1, best.indices.long()).sort(-1, descending=True).values
    assert_bitwise(kept, ranked.topk(4096).values)
    out = attnsieve.decode(q, k, v, best)
    for head in range(2):
        chosen = best.indices[0, head].long()
        wanted = scores[head][:, chosen].softmax(-1) @ v[0, head, chosen].double()
        torch.testing.assert_close(out[0, 2 * head :][:2, 0].double(), wanted, **bounds)
