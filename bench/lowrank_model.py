"""How much attention the tokens hold that low-rank proxies choose, on a model's queries and keys.

Usage: python bench/lowrank_model.py [--length N] [--rows N] [--topk N] [--every N] [--json FILE]

In each layer of the demo's model the prompt is all but the last --rows tokens: projections are
fitted to its queries and keys. Each later row then chooses the --topk keys before it with the
greatest proxy scores, head by head. Printed is the share of the row's attention weight that these
keys hold, mean over rows and heads, beside that of the exact best keys.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import attnsieve
import results
from attnsieve.demo import measure, model
from attnsieve.demo.options import DEFAULT_TEXT_OFFSET
from attnsieve.integrations.transformers import register
from attnsieve.methods import Dense

FITS = {
    "r16 kv head": dict(rank=16),
    "r32 kv head": dict(rank=32),
    "r16 query head": dict(rank=16, share="query_head"),
    "r32 query head": dict(rank=32, share="query_head"),
    "r16 pca": dict(rank=16, method="pca"),
    "r32 pca": dict(rank=32, method="pca"),
}


def recalls(q: Tensor, k: Tensor, scale: float, rows: int, topk: int) -> dict[str, float]:
    """Of one layer, every fit and the exact best."""
    prompt = q.shape[2] - rows
    heads = q.shape[1]
    late = q[:, :, prompt:]
    hidden = torch.arange(q.shape[2]) > torch.arange(prompt, q.shape[2])[:, None]

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(heads // x.shape[1], 1).transpose(2, 3)

    logits = (late @ spread(k) * scale).masked_fill_(hidden, -torch.inf)
    weights = logits.softmax(-1)

    def recall(scores: Tensor) -> float:
        chosen = scores.masked_fill(hidden, -torch.inf).topk(topk).indices
        return float(weights.gather(3, chosen).sum(3).mean())

    found = {"exact": recall(logits)}
    for name, options in FITS.items():
        fit = attnsieve.lowrank_fit(q[:, :, :prompt], k[:, :, :prompt], **options)
        found[name] = recall(fit.queries(late) @ spread(fit.keys(k)))
    return found


def main() -> None:
    """Fit every layer and print."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--length", type=int, default=4096)
    options.add_argument("--rows", type=int, default=128)
    options.add_argument("--topk", type=int, default=512)
    options.add_argument("--every", type=int, default=1, help="every how-manieth layer")
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    register()
    subject = model.load_subject(
        None, model.default_cache_dir(), torch.float32, torch.device("cpu")
    )
    ids = model.token_window(subject, model.read_text(None), DEFAULT_TEXT_OFFSET, chosen.length)
    rows = []
    seen = 0

    def observe(call: measure.Call) -> None:
        nonlocal seen
        number, seen = seen, seen + 1
        if number % chosen.every:
            return
        found = recalls(call.q, call.k, call.mask["softmax_scale"], chosen.rows, chosen.topk)
        rows.append(dict(layer=number, **found))
        print(f"layer {number:2}: " + ", ".join(f"{n} {x:.4f}" for n, x in found.items()))

    measure.measure(subject, ids, Dense(), repeats=1, observe=observe)
    for name in ("exact", *FITS):
        print(f"{name}: {sum(row[name] for row in rows) / len(rows):.4f} over {len(rows)} layers")
    if chosen.json:
        settings = {n: getattr(chosen, n) for n in ("length", "rows", "topk")}
        record = dict(
            **settings, date=results.today(), kernel_hash=results.current_hash(), rows=rows
        )
        chosen.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
