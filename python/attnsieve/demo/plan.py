"""Which rows the demo measures, and the top-p budget that costs as much as a top-k one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve.demo.measure import Call, TorchSdpa
from attnsieve.methods import (
    SALE,
    Dense,
    Method,
    OracleTopK,
    PooledTopK,
    PooledTopP,
    SpargeAttn,
    Threshold,
    XAttention,
)
from attnsieve.selection import pooled_block_scores, select_from_scores

# Names for --methods, in the order of the table.
FAMILIES = {
    "topk": "pooled top-k",
    "topp": "pooled top-p",
    "sale": "SALE",
    "xattention": "XAttention",
    "spargeattn": "SpargeAttn",
    "threshold": "threshold",
    "oracle": "oracle top-k",
}
FIXED = {
    "sale": {
        "tau=0.02": SALE(0.02),
        "rows/4": SALE(0.01, block_k=16, row_stride=4),
    },
    "xattention": {f"tau={tau:g}": XAttention(tau) for tau in (0.9, 0.95)},
    "spargeattn": {
        "topk=0.5": SpargeAttn(-0.1, cdf=None, topk=0.5, attention_sink=True),
        "cdf=0.98": SpargeAttn(0.3, cdf=0.98, attention_sink=True, block_q=64),
    },
}
SDPA = "torch SDPA"
DENSE = "attnsieve dense"


@dataclass(frozen=True)
class Row:
    """One method at one budget; ``budget`` is the text of the table."""

    name: str
    budget: str
    method: Method


class PooledScores:
    """Pooled scores of all layers of the dense run, to find budgets before spending them."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []
        self.seqlen = 0

    def observe(self, call: Call) -> None:
        scale = call.mask["softmax_scale"]
        self.layers.append(pooled_block_scores(call.q, call.k, softmax_scale=scale))
        self.seqlen = call.q.shape[2]

    def kept_blocks(self, method: PooledTopK | PooledTopP) -> int:
        """Blocks that ``method`` keeps over all layers and heads (64 x 64 blocks, causal)."""
        if isinstance(method, PooledTopK):
            rule = {"fraction": method.fraction}
        else:
            rule = {"top_p": method.top_p}
        index = select_from_scores(
            torch.cat(self.layers),
            self.seqlen,
            self.seqlen,
            min_blocks=method.min_blocks,
            sink_blocks=method.sink_blocks,
            local_blocks=method.local_blocks,
            causal=True,
            **rule,
        )
        return int(index.counts.sum())

    def top_p_like(self, fraction: float) -> float:
        """The smallest top_p, to four digits, that keeps as many blocks as top-k ``fraction``.

        Both rules keep every diagonal block, so as many blocks are as many pairs.
        """
        target = self.kept_blocks(PooledTopK(fraction))
        low, high = 0, 10_000
        while low < high:
            middle = (low + high) // 2
            if self.kept_blocks(PooledTopP(middle / 10_000)) < target:
                low = middle + 1
            else:
                high = middle
        return low / 10_000


def baseline_rows() -> tuple[Row, Row]:
    """The two dense rows that every speed-up refers to."""
    return Row(SDPA, "", TorchSdpa()), Row(DENSE, "", Dense())


def sparse_rows(
    families: Sequence[str],
    budgets: Sequence[float],
    threshold_scales: Sequence[float],
    scores: PooledScores,
) -> Iterator[Row]:
    """Rows of ``families``; top-p rows get the density of the top-k row of the same budget.

    The oracle runs at the smallest budget only: its selection costs more than dense attention.
    """
    if "topk" in families:
        for budget in budgets:
            yield Row(FAMILIES["topk"], f"{budget:g}", PooledTopK(budget))
    if "topp" in families:
        for budget in budgets:
            top_p = scores.top_p_like(budget)
            yield Row(FAMILIES["topp"], f"p={top_p:g}", PooledTopP(top_p))
    for family in (name for name in FIXED if name in families):
        for budget, method in FIXED[family].items():
            yield Row(FAMILIES[family], budget, method)
    if "threshold" in families:
        for scale in threshold_scales:
            yield Row(FAMILIES["threshold"], f"{scale:g}/L", Threshold(scale))
    if "oracle" in families:
        yield Row(FAMILIES["oracle"], f"{min(budgets):g}", OracleTopK(min(budgets)))


def count_rows(
    families: Sequence[str], budgets: Sequence[float], threshold_scales: Sequence[float]
) -> int:
    """Rows of the whole table, for the progress bar."""
    counts = dict(topk=len(budgets), topp=len(budgets), threshold=len(threshold_scales), oracle=1)
    counts |= {family: len(methods) for family, methods in FIXED.items()}
    return 2 + sum(counts[family] for family in families)
