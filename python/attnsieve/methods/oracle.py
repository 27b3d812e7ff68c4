"""Blocks chosen by the attention they really receive: the yardstick of every selector."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve.index import BlockIndex
from attnsieve.methods.base import BlockMethod
from attnsieve.selection import select_from_scores


@dataclass(frozen=True)
class OracleTopK(BlockMethod):
    """:class:`~attnsieve.methods.PooledTopK`'s budget, spent on the blocks of largest true mass.

    The scores are :func:`block_mass`, which costs more than dense attention: this shows how good a
    selector could be at a budget, it saves nothing.
    """

    fraction: float
    block_q: int = 64
    block_k: int = 64
    min_blocks: int = 2
    sink_blocks: int = 1

    def select(
        self, q, k, *, causal, window=None, softmax_scale=None, layer_idx=None
    ) -> BlockIndex:
        blocks = dict(block_q=self.block_q, block_k=self.block_k)
        mask = dict(causal=causal, window=window)
        mass = block_mass(q, k, softmax_scale=softmax_scale, **blocks, **mask)
        return select_from_scores(
            mass,
            q.shape[2],
            k.shape[2],
            fraction=self.fraction,
            min_blocks=self.min_blocks,
            sink_blocks=self.sink_blocks,
            **blocks,
            **mask,
        )


def block_mass(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int = 64,
    block_k: int = 64,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Mean attention weight that each block of query rows gives to each block of keys.

    Args:
        q: ``[B, Hq, Sq, D]``; k: ``[B, Hkv, Sk, D]``; masks and scale as in
            :func:`attnsieve.block_sparse_attention`.

    Returns:
        float32 ``[B, Hq, ceil(Sq / block_q), ceil(Sk / block_k)]``; a row sums to the share of its
        query rows that see any key. Plain torch, one block of query rows at a time.
    """
    batch, num_heads, seqlen_q, head_dim = q.shape
    num_kv_heads, seqlen_k = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    left, right = window if window is not None else (-1, -1)
    right = 0 if causal else right
    # The query heads of a KV head become rows of one product, so k is not expanded.
    grouped = (q.float() * scale).reshape(batch * num_kv_heads, group, seqlen_q, head_dim)
    keys = k.float().reshape(batch * num_kv_heads, seqlen_k, head_dim)
    rows_can_be_empty = left >= 0 or seqlen_q > seqlen_k
    num_columns = -(-seqlen_k // block_k)
    mass = q.new_zeros(batch, num_heads, -(-seqlen_q // block_q), num_columns, dtype=torch.float32)
    for row, begin in enumerate(range(0, seqlen_q, block_q)):
        end = min(begin + block_q, seqlen_q)
        diagonal = torch.arange(begin, end, device=q.device)[:, None] + (seqlen_k - seqlen_q)
        stop = seqlen_k if right < 0 else min(seqlen_k, end + seqlen_k - seqlen_q + right)
        if stop <= 0:
            continue
        scores = grouped[:, :, begin:end].flatten(1, 2) @ keys[:, :stop].transpose(1, 2)
        scores = scores.unflatten(1, (group, end - begin))
        columns = torch.arange(stop, device=q.device)
        if right >= 0:
            # Keys before `first` are visible to every row of the block as far as `right` goes.
            first = min(max(begin + seqlen_k - seqlen_q + right, 0), stop)
            scores[..., first:].masked_fill_(columns[first:] > diagonal + right, -math.inf)
        if left >= 0:
            scores.masked_fill_(columns < diagonal - left, -math.inf)
        weights = scores.softmax(dim=-1)
        if rows_can_be_empty:  # softmax over nothing is NaN; such a row gives no mass
            weights = weights.nan_to_num(nan=0.0)
        mean = torch.nn.functional.pad(weights.mean(dim=2), (0, -stop % block_k))
        blocks = mean.unflatten(-1, (-1, block_k)).sum(dim=-1)
        mass[:, :, row, : blocks.shape[-1]] = blocks.view(batch, num_heads, -1)
    return mass
