"""Perplexity of decode steps whose tokens low-rank proxies choose, beside exact top-k and dense.

Usage: python bench/lowrank_perplexity.py [--length N] [--steps N] [--budgets N,N] [--rows TEXT]
                                         [--json FILE]

The demo's decode setting: its model reads all but the last --steps + 1 tokens of the window, then
takes one token at a time and is scored on the next. Every method has a list per KV head, an eighth
of it the newest tokens; "exact" chooses by the logits themselves, largest over the group's heads.
--rows leaves out the rows without this in their names, but the dense one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

import attnsieve
import model_layers
from attnsieve.demo import decode
from attnsieve.methods import DecodeMethod, DenseDecode, LowRank

# name of a row -> options of LowRank
PROXIES = {
    "r16 kv head": dict(rank=16),
    "r32 kv head": dict(rank=32),
    "r32 query head": dict(rank=32, share="query_head"),
    "r16 kv head refined": dict(rank=16, refine=True),
    "r32 kv head refined": dict(rank=32, refine=True),
    "r32 query head refined": dict(rank=32, share="query_head", refine=True),
}


@dataclass(eq=False)
class Exact(DecodeMethod):
    """The k tokens of the largest logits, the newest among them."""

    k: int = 512
    recent: int = 64

    def __call__(
        self, q, cache, *, layer_idx=0, sequence=0, softmax_scale=None, sink=None
    ) -> Tensor:
        return attnsieve.topk_attention(
            q,
            cache.k_cache,
            cache.v_cache,
            k=self.k,
            score="exact",
            recent_tokens=self.recent,
            **cache.where,
            softmax_scale=softmax_scale,
            sink=sink,
        )


def rows_of(budgets: Sequence[int]) -> Iterator[tuple[str, str, DecodeMethod]]:
    """(name, budget, method), the dense one first."""
    yield "dense", "", DenseDecode()
    for budget in budgets:
        recent = max(1, budget // 8)
        yield "exact", str(budget), Exact(budget, recent)
        for name, options in PROXIES.items():
            yield name, str(budget), LowRank(budget, recent=recent, **options)


def main() -> None:
    """Measure and print."""
    options = model_layers.options(__doc__.splitlines()[0], length=4096)
    options.add_argument("--steps", type=int, default=128)
    options.add_argument("--budgets", type=model_layers.numbers, default=(64, 128, 256, 512, 1024))
    options.add_argument("--rows", default="")
    chosen = options.parse_args()
    subject, ids = model_layers.load(chosen.length)
    rows = [row for row in rows_of(chosen.budgets) if row[0] == "dense" or chosen.rows in row[0]]
    found = decode.measure_decode(
        subject, ids, rows, chosen.steps, lambda text: print(text, flush=True)
    )
    dense = found[0].perplexity
    for row in found:
        print(
            f"{row.method} {row.budget}: {row.perplexity:.3f}, {row.perplexity / dense - 1:+.2%}, "
            f"attention {row.attention_ms:.1f} ms"
        )
    model_layers.write(
        chosen, ("length", "steps", "budgets"), rows=[row.as_dict() for row in found]
    )


if __name__ == "__main__":
    main()
