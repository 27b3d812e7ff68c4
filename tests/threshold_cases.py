"""Decode steps over caches whose tiles differ in size, so that a threshold skips some of them."""

from __future__ import annotations

import math

import torch

from cases import BAD_IDS, randn
from layouts import deal_pages, fill_pages

PLAIN = dict(
    heads=(8, 2),
    rows=1,
    lengths=(1500, 700),
    cache=None,
    missing=False,
    float8=False,
    sink=False,
    causal=True,
    head_dim=64,
    dtype=torch.float32,
)


def peaked_keys(shape, dtype, seed, tile=64):
    """Normal keys times a factor per sequence, head and tile."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, length, _ = shape
    size = (3 * torch.rand(batch, heads, -(-length // tile), 1, generator=generator)) ** 2
    size = size.repeat_interleave(tile, dim=2)[:, :, :length]
    return (randn(shape, seed=seed) * size * 0.4).to(dtype)


def decode_case(pick, seed=0):
    """(q, k_cache, v_cache), options, and the (q, k, v) that the cache stands for.

    Whatever lies beyond a sequence, or in a page that none owns, is NaN.
    """
    pick = PLAIN | pick
    heads, rows, lengths = pick["heads"], pick["rows"], pick["lengths"]
    capacity, dtype, dim = max(lengths) + 5, pick["dtype"], pick["head_dim"]
    batch = len(lengths)
    q = randn((batch, heads[0], rows, dim), dtype, seed=seed)
    k = peaked_keys((batch, heads[1], capacity, dim), dtype, seed + 1)
    v = randn((batch, heads[1], capacity, dim), dtype, seed=seed + 2)
    options = dict(causal=pick["causal"], phase="decode")
    numbers = k, v
    if pick["float8"]:
        scales = [torch.linspace(0.5, 1.5, heads[1]), torch.linspace(2, 0.25, heads[1])]
        options |= dict(zip(("k_scale", "v_scale"), scales, strict=True))
        k, v = (x.to(torch.float8_e4m3fn) for x in (k, v))
        numbers = [
            (x.float() * s[:, None, None]).to(dtype) for x, s in zip((k, v), scales, strict=True)
        ]
    if pick["sink"]:
        options["sink"] = randn((heads[0],), seed=seed + 3)
    options["seq_lens"] = torch.tensor(lengths, dtype=torch.int32)
    bad = 0x7F if pick["float8"] else math.nan
    caches = []
    for x in (k, v):
        bits = x.clone().view(torch.uint8) if pick["float8"] else x.clone()
        for b, length in enumerate(lengths):
            bits[b, :, length:] = bad
        caches.append(bits)
    if pick["cache"] is not None:
        table = deal_pages(lengths, -(-capacity // pick["cache"]), pick["cache"], seed)
        caches = [fill_pages(x, lengths, table, pick["cache"], bad) for x in caches]
        if pick["missing"]:
            slots = torch.arange(3, table.shape[1], 7)
            table[:, slots] = torch.tensor(BAD_IDS, dtype=torch.int32)[slots % len(BAD_IDS)]
        options["block_table"] = table
    return (q, *(x.view(k.dtype) for x in caches)), options, (q, *numbers)
