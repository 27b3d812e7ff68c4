"""Threshold skipping in two visiting orders, in plain torch on the demo's model.

Usage: python bench/ascending_order.py [--length 4096] [--scales 30 100 300 1000 3000]

Prints the skipped share of tiles and the perplexity of both orders at ``lambda = F / length``:
"ascending" visits tiles from the first key on, as published (BLASST, arXiv 2512.12087); "last
first" starts with the tile of the group's last visible key, as this library does. Groups of 64
query rows, tiles of 128 keys, float32; the first visited tile is never skipped.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnsieve.demo import measure
from attnsieve.demo import model as models
from attnsieve.demo.options import DEFAULT_TEXT_OFFSET
from attnsieve.integrations.transformers import register
from attnsieve.methods import Method

ROWS, KEYS = 64, 128
ORDERS = {"ascending": False, "last first": True}


@dataclass
class OrderedThreshold(Method):
    """Causal attention over whole tiles, counting those it skips and visits."""

    scale: float
    last_first: bool
    skipped: int = 0
    visited: int = 0
    min_seqlen_q: int = field(default=0, init=False)

    def __call__(
        self, q, k, v, *, causal, window=None, softmax_scale=None, sink=None, layer_idx=None
    ) -> Tensor:
        length, group = q.shape[2], q.shape[1] // k.shape[1]
        scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        out = torch.empty_like(q)
        for head in range(q.shape[1]):
            logits = scale * (q[0, head] @ k[0, head // group].T)
            logits.masked_fill_(hidden, -math.inf)
            skips = self._skips(logits, self.scale / length)
            tiles = logits.view(length // ROWS, ROWS, length // KEYS, KEYS)
            tiles.masked_fill_(skips[:, None, :, None], -math.inf)
            out[0, head] = torch.softmax(logits, -1) @ v[0, head // group]
        return out

    def _skips(self, logits: Tensor, threshold: float) -> Tensor:
        """bool ``[groups, tiles]``: the walk of every group of rows."""
        num_groups, num_tiles = len(logits) // ROWS, logits.shape[1] // KEYS
        best = logits.view(num_groups, ROWS, num_tiles, KEYS).amax(-1)
        groups = torch.arange(num_groups)
        last = ((groups + 1) * ROWS - 1) // KEYS
        skips = torch.zeros(num_groups, num_tiles, dtype=torch.bool)
        running = best[groups, :, last] if self.last_first else best[:, :, 0]
        for tile in range(num_tiles):
            visits = tile < last if self.last_first else (tile > 0) & (tile <= last)
            rise = best[:, :, tile] - running
            skips[:, tile] = visits & (rise < math.log(threshold)).all(1)
            attends = (visits & ~skips[:, tile])[:, None]
            running = torch.where(attends, torch.maximum(running, best[:, :, tile]), running)
        self.skipped += int(skips.sum())
        self.visited += int((last + 1).sum())
        return skips


def main() -> None:
    """Prints one line per scale and order."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--length", type=int, default=4096, help="tokens, a multiple of 128")
    scales = [30.0, 100.0, 300.0, 1000.0, 3000.0]
    options.add_argument("--scales", type=float, nargs="+", default=scales, help="F")
    chosen = options.parse_args()
    if chosen.length < KEYS or chosen.length % KEYS:
        options.error("--length: expected a multiple of 128")
    register()
    cpu, cache = torch.device("cpu"), models.default_cache_dir()
    subject = models.load_subject(None, cache, torch.float32, cpu)
    text = models.read_text(None)
    ids = models.token_window(subject, text, DEFAULT_TEXT_OFFSET, chosen.length)
    print(f"{subject.name}, {chosen.length} tokens, float32")
    print(f"{'F':>8}  {'order':<10}  {'skipped':>7}  {'perplexity':>10}")
    for scale in chosen.scales:
        for order, last_first in ORDERS.items():
            method = OrderedThreshold(scale, last_first)
            hidden, _ = measure.forward(subject, ids, method)
            perplexity = measure.perplexity(subject, hidden, ids)
            share = method.skipped / method.visited
            print(f"{scale:>8g}  {order:<10}  {share:>7.3f}  {perplexity:>10.3f}", flush=True)


if __name__ == "__main__":
    main()
