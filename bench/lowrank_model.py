"""How much attention the tokens hold that low-rank proxies choose, on a model's queries and keys.

Usage: python bench/lowrank_model.py [--length N] [--rows N] [--topk N] [--ranks N,N] [--every N]
                                     [--json FILE] [--plot FILE]

In each layer of the demo's model the prompt is all but the last --rows tokens: projections are
fitted to its queries and keys. Each later row then chooses the --topk keys before it with the
greatest proxy scores, head by head. Printed is the share of the row's attention weight that these
keys hold, mean over rows and heads, beside that of the exact best keys. --plot draws their means
over the layers against the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import attnsieve
import model_layers
from attnsieve.demo import measure

# name of a line -> options of lowrank_fit
KINDS = {
    "kv head": {},
    "query head": dict(share="query_head"),
    "pca": dict(method="pca"),
}


def name_of(rank: int, kind: str) -> str:
    return f"r{rank} {kind}"


def recalls(
    q: Tensor, k: Tensor, scale: float, rows: int, topk: int, ranks: Sequence[int]
) -> dict[str, float]:
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
    for rank in ranks:
        for kind, options in KINDS.items():
            fit = attnsieve.lowrank_fit(q[:, :, :prompt], k[:, :, :prompt], rank, **options)
            found[name_of(rank, kind)] = recall(fit.queries(late) @ spread(fit.keys(k)))
    return found


def plot(path: Path, means: dict[str, float], ranks: Sequence[int], topk: int) -> None:
    """Recall against rank, a line a kind; the type of the file is ``path``'s suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
    for kind, marker in zip(KINDS, "os^", strict=True):
        axes.plot(ranks, [means[name_of(rank, kind)] for rank in ranks], marker=marker, label=kind)
    axes.axhline(means["exact"], color="black", linewidth=0.8, linestyle="--", label="exact")
    axes.set_xlabel("rank: numbers of a key that are scored")
    axes.set_ylabel(f"attention mass in the best {topk} keys")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Fit every layer and print."""
    options = model_layers.options(__doc__.splitlines()[0], length=4096)
    options.add_argument("--rows", type=int, default=128)
    options.add_argument("--topk", type=int, default=512)
    options.add_argument("--ranks", type=model_layers.numbers, default=(16, 32))
    options.add_argument("--plot", type=Path)
    chosen = options.parse_args()

    def look(number: int, call: measure.Call) -> dict:
        scale = call.mask["softmax_scale"]
        found = recalls(call.q, call.k, scale, chosen.rows, chosen.topk, chosen.ranks)
        texts = ", ".join(f"{name} {x:.4f}" for name, x in found.items())
        print(f"layer {number:2}: {texts}", flush=True)
        return found

    rows = model_layers.observe(chosen, ("length", "rows", "topk", "ranks"), look)
    means = {
        name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name != "layer"
    }
    for name, mean in means.items():
        print(f"{name}: {mean:.4f} over {len(rows)} layers")
    if chosen.plot:
        plot(chosen.plot, means, chosen.ranks, chosen.topk)


if __name__ == "__main__":
    main()
