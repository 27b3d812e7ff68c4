"""``threshold_attention`` with its decode phase in plain torch, where the library has none yet."""

from __future__ import annotations

import inspect

import torch

from attnsieve import reference_decode, threshold_attention
from attnsieve.methods import threshold as methods_threshold

TILE = 128


def decode(q, k_cache, v_cache, threshold, *, two_phase, block_table, seq_lens, **options):
    """One new row of one sequence in pages, one split: heads of a KV head decide together."""
    length, group = int(seq_lens[0]), q.shape[1] // k_cache.shape[2]
    options = {name: x for name, x in options.items() if x is not None}
    options.pop("causal"), options.pop("phase"), options.pop("return_counters", None)
    k, v = (reference_decode._cached(x, block_table, 0, length)[0] for x in (k_cache, v_cache))
    scale = options.get("softmax_scale", q.shape[-1] ** -0.5)
    logits = (q[0].unflatten(0, (-1, group)) @ k[:, None].mT)[:, :, 0] * scale  # [Hkv, group, T]
    tiles = torch.stack([tile.amax(-1) for tile in logits.split(TILE, -1)], -1)
    before = torch.cat([torch.full_like(tiles[..., :1], -torch.inf), tiles.cummax(-1).values], -1)
    before = tiles.amax(-1, keepdim=True) if two_phase else before[..., :-1]
    skip = (tiles - before < torch.log(threshold)).all(1)  # [Hkv, tiles]
    keys = skip.repeat_interleave(TILE, -1)[:, None, :length]
    out = torch.softmax(logits.masked_fill(keys, -torch.inf), -1) @ v
    counts = torch.stack([skip.sum(-1), torch.full_like(skip.sum(-1), skip.shape[-1])], -1)
    return out.flatten(0, 1)[None, :, None], counts.repeat_interleave(group, 0)[None]


def install(monkeypatch) -> None:
    """Nothing where the library decodes with thresholds itself."""
    if "phase" in inspect.signature(threshold_attention).parameters:
        return

    def attend(q, k, v, threshold, **options):
        if options.get("phase") != "decode":
            return threshold_attention(q, k, v, threshold, **options)
        out, counters = decode(q, k, v, threshold, **options)
        return (out, counters) if options.get("return_counters") else out

    monkeypatch.setattr(methods_threshold, "threshold_attention", attend)
