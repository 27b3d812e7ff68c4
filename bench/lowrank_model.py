"""How much attention the tokens hold that low-rank proxies choose, on a model's queries and keys.

Usage: python bench/lowrank_model.py [--length N] [--rows N] [--topk N] [--every N] [--json FILE]

In each layer of the demo's model the prompt is all but the last --rows tokens: projections are
fitted to its queries and keys. Each later row then chooses the --topk keys before it with the
greatest proxy scores, head by head. Printed is the share of the row's attention weight that these
keys hold, mean over rows and heads, beside that of the exact best keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

import attnsieve
import model_layers
from attnsieve.demo import measure

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
    options = model_layers.options(__doc__.splitlines()[0], length=4096)
    options.add_argument("--rows", type=int, default=128)
    options.add_argument("--topk", type=int, default=512)
    chosen = options.parse_args()

    def look(number: int, call: measure.Call) -> dict:
        found = recalls(call.q, call.k, call.mask["softmax_scale"], chosen.rows, chosen.topk)
        texts = ", ".join(f"{name} {x:.4f}" for name, x in found.items())
        print(f"layer {number:2}: {texts}", flush=True)
        return found

    rows = model_layers.observe(chosen, ("length", "rows", "topk"), look)
    for name in ("exact", *FITS):
        print(f"{name}: {sum(row[name] for row in rows) / len(rows):.4f} over {len(rows)} layers")


if __name__ == "__main__":
    main()
