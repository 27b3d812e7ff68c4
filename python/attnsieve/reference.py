"""float64 oracles of the public functions: the same names and arguments, plain and slow.

Inputs of any dtype are upcast to float64 on their device; results stay float64. Each oracle states
its function's definition in the most direct way, by token masks and Python loops, and shares
nothing with the kernels. Use them to test a kernel, or to read what a function means.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnsieve._arguments import check_decode_values
from attnsieve._reference_attention import from_pages, softmax_attention
from attnsieve._reference_estimate import estimate_block_scores
from attnsieve._reference_quantize import quantize_blocks
from attnsieve._reference_selection import (
    Window,
    pooled_block_scores,
    select_blocks,
    select_from_scores,
    visible_mask,
)
from attnsieve._reference_threshold import (
    SkipWalk,
    lambda_table,
    listed_blocks,
    scaled_scores,
    threshold_walk,
)
from attnsieve._reference_threshold_decode import attend_cached, threshold_decode_walk
from attnsieve.index import BlockIndex

__all__ = [
    "SkipWalk",
    "block_sparse_attention",
    "estimate_block_scores",
    "index_multiplicity",
    "merge_states",
    "pooled_block_scores",
    "quantize_blocks",
    "select_blocks",
    "select_from_scores",
    "threshold_attention",
    "threshold_decode_walk",
    "threshold_walk",
    "visible_mask",
]


def index_multiplicity(
    index: BlockIndex | None, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int
) -> Tensor:
    """int64 ``[batch, num_heads, seqlen_q, seqlen_k]``: how often the index lists each pair.

    1 everywhere without an index; above 1 only where a row repeats a block. Masks are not applied.
    """
    if index is None:
        return torch.ones(batch, num_heads, seqlen_q, seqlen_k, dtype=torch.int64)
    device, bq, bk = index.device, index.block_q, index.block_k
    times = torch.zeros(batch, num_heads, seqlen_q, seqlen_k, dtype=torch.int64, device=device)
    for b in range(batch):
        for h in range(num_heads):
            lists = listed_blocks(index, b, h, num_heads, -(-seqlen_k // bk))
            for row, blocks in enumerate(lists):
                for block in blocks:
                    times[b, h, row * bq : (row + 1) * bq, block * bk : (block + 1) * bk] += 1
    return times


def _attend(q, k, v, times, softmax_scale, sink) -> tuple[Tensor, Tensor]:
    """Batched problem with pair multiplicities ``times [B, Hq, Sq, Sk]``, masks included."""
    batch, num_heads, seqlen_q, head_dim = q.shape
    group_size = num_heads // k.shape[1] if num_heads else 1
    out = torch.zeros(batch, num_heads, seqlen_q, head_dim, dtype=torch.float64, device=q.device)
    lse = torch.zeros(batch, num_heads, seqlen_q, dtype=torch.float64, device=q.device)
    for b in range(batch):
        for h in range(num_heads):
            kv_head = h // group_size
            scores = scaled_scores(q[b, h], k[b, kv_head], softmax_scale)
            head_sink = None if sink is None else sink[h]
            out[b, h], lse[b, h] = softmax_attention(scores, v[b, kv_head], times[b, h], head_sink)
    return out, lse


def _own_index(index: BlockIndex | None, b: int) -> BlockIndex | None:
    """The lists of sequence ``b`` alone."""
    if index is None or index.counts.shape[0] == 1:
        return index
    one = slice(b, b + 1)
    return BlockIndex(index.counts[one], index.columns[one], index.block_q, index.block_k)


def _per_sequence(attend_one, q, k, v, index, cu_seqlens_q, cu_seqlens_k, block_table, seq_lens):
    """Runs ``attend_one(b, q, k, v, index, exists)`` on each sequence of a varlen or paged problem.

    ``exists`` is None, or bool ``[Sk]``: the keys that lie in a page.
    """
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    starts_q = None if cu_seqlens_q is None else cu_seqlens_q.tolist()
    starts_k = None if cu_seqlens_k is None else cu_seqlens_k.tolist()
    num_heads = q.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:-1], -math.inf, dtype=torch.float64, device=q.device)
    counters = torch.zeros(batch, num_heads, 2, dtype=torch.int64, device=q.device)
    for b in range(batch):
        exists = None
        if block_table is not None:
            seqlen_k = min(max(int(seq_lens[b]), 0), block_table.shape[1] * k.shape[1])
            own_k, exists = from_pages(k, block_table[b], seqlen_k)
            own_v, _ = from_pages(v, block_table[b], seqlen_k)
        else:
            keys = slice(starts_k[b], starts_k[b + 1])
            own_k, own_v = (x[keys].transpose(0, 1)[None] for x in (k, v))
        if starts_q is None:
            own_q, rows = q[b : b + 1], b
        else:
            rows = slice(starts_q[b], starts_q[b + 1])
            own_q = q[rows].transpose(0, 1)[None]
        one_out, one_lse, one_counters = attend_one(
            b, own_q, own_k, own_v, _own_index(index, b), exists
        )
        varlen = starts_q is not None
        out[rows] = one_out[0].transpose(0, 1) if varlen else one_out[0]
        lse[rows] = one_lse[0].transpose(0, 1) if varlen else one_lse[0]
        counters[b] = one_counters[0]
    return out, lse, counters


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex | None = None,
    *,
    causal: bool = False,
    window: Window = None,
    softmax_scale: float | None = None,
    sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    validate: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Oracle of ``attnsieve.block_sparse_attention``: dense attention with a token mask.

    Shapes as there. Returns ``out`` (float64, q's shape) or ``(out, lse)``.
    """
    result = threshold_attention(
        q,
        k,
        v,
        None,
        index=index,
        causal=causal,
        window=window,
        softmax_scale=softmax_scale,
        sink=sink,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        block_table=block_table,
        seq_lens=seq_lens,
        validate=validate,
        return_lse=True,
    )
    return result if return_lse else result[0]


def threshold_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    threshold: float | Tensor | None = None,
    *,
    phase: str = "prefill",
    index: BlockIndex | None = None,
    skip_block: int = 128,
    two_phase: bool = False,
    num_splits: int | None = None,
    causal: bool = False,
    window: Window = None,
    softmax_scale: float | None = None,
    sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    validate: bool = False,
    return_lse: bool = False,
    return_counters: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Oracle of ``attnsieve.threshold_attention``: attention over the pairs that a walk keeps.

    The walk is ``threshold_walk``, in decode ``threshold_decode_walk``. Shapes and arguments as
    there, but ``threshold`` is given as such. Returns ``out`` (float64), or a tuple
    ``(out[, lse][, counters])``. Differentiable in q, k, v and sink in prefill: decisions are
    constants.
    """
    if phase == "decode":
        if validate:
            check_decode_values(k, None, block_table, seq_lens)
        where = dict(block_table=block_table, seq_lens=seq_lens, k_scale=k_scale)
        where["softmax_scale"] = softmax_scale
        splits = dict(skip_block=skip_block, num_splits=num_splits, two_phase=two_phase)
        splits["causal"] = causal
        walk = threshold_decode_walk(q, k, threshold, **splits, **where)
        out, lse = attend_cached(q, k, v, walk.times, sink=sink, v_scale=v_scale, **where)
        results = (out,) + (lse,) * return_lse + (walk.counters,) * return_counters
        return results if len(results) > 1 else out
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    lambdas = None if threshold is None else lambda_table(threshold, batch, q.shape[1])

    def attend_one(b, q, k, v, index, exists):
        if validate and index is not None:
            index.validate(-(-k.shape[2] // index.block_k))
        own = lambdas if lambdas is None or b is None else lambdas[b : b + 1]
        masks = dict(causal=causal, window=window)
        if lambdas is None:
            times = index_multiplicity(index, q.shape[0], q.shape[1], q.shape[2], k.shape[2])
            visible = visible_mask(q.shape[2], k.shape[2], device=q.device, **masks)
            times = times.to(q.device) * (visible if exists is None else visible & exists)
            counters = torch.zeros(*q.shape[:2], 2, dtype=torch.int64, device=q.device)
        else:
            walk = dict(softmax_scale=softmax_scale, exists=exists, skip_block=skip_block)
            times, counters, _ = threshold_walk(q, k, own, index=index, **walk, **masks)
        return *_attend(q, k, v, times, softmax_scale, sink), counters

    if cu_seqlens_q is None and block_table is None:
        out, lse, counters = attend_one(None, q, k, v, index, None)
    else:
        where = cu_seqlens_q, cu_seqlens_k, block_table, seq_lens
        out, lse, counters = _per_sequence(attend_one, q, k, v, index, *where)
    results = (out,) + (lse,) * return_lse + (counters,) * return_counters
    return results if len(results) > 1 else out


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Oracle of ``attnsieve.merge_states``: ``outs [N, ..., D]``, ``lses [N, ...]``, natural log.

    ``out = sum_n softmax_n(lse) * outs[n]``, ``lse = logsumexp_n``; a state with lse = -inf holds
    nothing and counts for nothing, and if all do, out = 0 and lse = -inf.
    """
    outs, lses = outs.double(), lses.double()
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.where(lses == -math.inf, 0.0, torch.exp(lses - lse)).unsqueeze(-1)
    return torch.where(weights == 0, 0.0, weights * outs).sum(dim=0), lse
