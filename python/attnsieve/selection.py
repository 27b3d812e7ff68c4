"""The public selection functions: scores of KV blocks, and the lists that scores select.

Shapes, devices and streams as in ``attnsieve.ops``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnsieve._arguments import (
    DEFAULT_BLOCK,
    Window,
    call_op,
    default_scale,
    window_sides,
)
from attnsieve.index import BlockIndex

__all__ = ["pooled_block_scores", "select_blocks", "select_from_scores", "select_marked"]


def _pool(x: Tensor, block: int) -> Tensor:
    """float32 means over blocks of rows: [B, H, S, D] -> [B, H, ceil(S / block), D]."""
    rows = x.shape[2]
    full = rows // block * block
    parts = [x[:, :, :full].unflatten(2, (-1, block)).mean(3, dtype=torch.float32)] if full else []
    if full < rows:
        parts.append(x[:, :, full:].mean(2, keepdim=True, dtype=torch.float32))
    if not parts:
        return x.new_empty((*x.shape[:2], 0, x.shape[3]), dtype=torch.float32)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def pooled_block_scores(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int = DEFAULT_BLOCK,
    block_k: int = DEFAULT_BLOCK,
    softmax_scale: float | None = None,
) -> Tensor:
    """Block scores from mean-pooled queries and keys (MInference, MoBA and others).

    Args:
        q: ``[B, Hq, Sq, D]``; k: ``[B, Hkv, Sk, D]``, same dtype and device.
        block_q, block_k: rows pooled into one; a ragged last block averages its real rows.
        softmax_scale: default ``1 / sqrt(D)``.

    Returns:
        float32 ``[B, Hq, nQ, nK]``: ``softmax_scale * mean(q block) . mean(k block)``. No masks:
        the selector knows which blocks a row sees.

    Raises:
        ValueError: shapes do not fit.
    """
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q, k: expected [B, Hq, Sq, D] and [B, Hkv, Sk, D] of one batch and head_dim, got "
            f"{list(q.shape)} and {list(k.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"q: {q.shape[1]} heads are no multiple of k's {k.shape[1]}")
    scale = default_scale(q, softmax_scale)
    pooled_q, pooled_k = _pool(q, block_q), _pool(k, block_k)
    grouped = pooled_q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, Hkv, G * nQ, D]
    scores = torch.matmul(grouped, pooled_k.transpose(2, 3)) * scale
    return scores.view(q.shape[0], q.shape[1], pooled_q.shape[2], pooled_k.shape[2])


def select_from_scores(
    scores: Tensor,
    seqlen_q: int,
    seqlen_k: int,
    *,
    topk: int | None = None,
    fraction: float | None = None,
    top_p: float | None = None,
    block_q: int = DEFAULT_BLOCK,
    block_k: int = DEFAULT_BLOCK,
    min_blocks: int = 1,
    sink_blocks: int = 1,
    local_blocks: int = 0,
    diagonal: bool = True,
    causal: bool = False,
    window: Window | None = None,
) -> BlockIndex:
    """Keeps the best KV blocks of every row of block scores, on device and exactly.

    A row sees the KV blocks that hold a key visible to one of its query rows. Ranking is by score,
    descending; ties go to the smaller index, NaN ranks below -inf. Forced blocks (the first
    ``sink_blocks``, the row's ``diagonal`` blocks, ``local_blocks`` before them) rank above all
    and are inside the budget; more forced blocks than budget are all kept.

    Args:
        scores: float32 ``[B, H, nQ, nK]``, last dimension contiguous.
        seqlen_q, seqlen_k: lengths in tokens, for the masks and the ragged last blocks.
        block_q, block_k: 64 or 128 query rows and 16, 32, 64 or 128 keys per block.
        topk: budget of k blocks per row; or
        fraction: budget of ``max(min_blocks, ceil(fraction * visible blocks))`` per row; or
        top_p: fewest blocks whose softmax weight over the row's visible blocks reaches ``top_p``,
            at least ``min_blocks``. Weights are summed in fixed point (2^-32), so the choice does
            not depend on any order of summation.
        causal, window: as in :func:`block_sparse_attention`.

    Returns:
        A canonical :class:`BlockIndex` with H list heads; unused slots are -1.

    Raises:
        ValueError: malformed argument, named in the text; not exactly one rule.
    """
    left, right = window_sides(window)
    counts, columns = call_op(
        torch.ops.attnsieve.select_blocks.default,
        scores,
        seqlen_q,
        seqlen_k,
        block_q,
        block_k,
        topk,
        fraction,
        top_p,
        min_blocks,
        sink_blocks,
        local_blocks,
        diagonal,
        causal,
        left,
        right,
    )
    return BlockIndex(counts, columns, block_q, block_k)


def select_marked(
    bits: Tensor,
    seqlen_q: int,
    seqlen_k: int,
    *,
    block_q: int = DEFAULT_BLOCK,
    block_k: int = DEFAULT_BLOCK,
    capacity: int | None = None,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    diagonal: bool = False,
    causal: bool = False,
    window: Window | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> BlockIndex:
    """Lists of the blocks whose bit is set, with forced blocks, and none that no row sees.

    Args:
        bits: int32 ``[B, H, nQ, ceil(nK / 32)]`` as :func:`estimate_block_scores` writes them,
            contiguous: block b is bit ``b % 32`` of word ``b // 32``.
        capacity: room of a row, None for all nK blocks. A row that would keep more keeps its sink
            blocks and of the others those of the greatest positions; its count is the capacity.
        sink_blocks, local_blocks, diagonal: kept whatever their bits, as in
            :func:`select_from_scores`.
        seqlen_q, seqlen_k, block_q, block_k, causal, window: as there.
        cu_seqlens_q, cu_seqlens_k: int32 ``[B + 1]``, ascending: the lengths of packed sequences,
            each counted from its own start; seqlen_q and seqlen_k are then those of the longest.

    Returns:
        A canonical :class:`BlockIndex` with H list heads; unused slots are -1.

    Raises:
        ValueError: malformed argument, named in the text.
    """
    counts, columns = call_op(
        torch.ops.attnsieve.select_marked.default,
        bits,
        cu_seqlens_q,
        cu_seqlens_k,
        seqlen_q,
        seqlen_k,
        block_q,
        block_k,
        capacity,
        sink_blocks,
        local_blocks,
        diagonal,
        causal,
        *window_sides(window),
    )
    return BlockIndex(counts, columns, block_q, block_k)


def select_blocks(
    q: Tensor,
    k: Tensor,
    *,
    topk: int | None = None,
    fraction: float | None = None,
    top_p: float | None = None,
    block_q: int = DEFAULT_BLOCK,
    block_k: int = DEFAULT_BLOCK,
    min_blocks: int = 1,
    sink_blocks: int = 1,
    local_blocks: int = 0,
    diagonal: bool = True,
    causal: bool = False,
    window: Window | None = None,
    softmax_scale: float | None = None,
) -> BlockIndex:
    """Selects KV blocks per q-block and query head by mean-pooled scores.

    :func:`pooled_block_scores` followed by :func:`select_from_scores`; arguments, ranking and
    errors are theirs. Batched tensors only: neither packed sequences nor pages.
    """
    scores = pooled_block_scores(
        q, k, block_q=block_q, block_k=block_k, softmax_scale=softmax_scale
    )
    return select_from_scores(
        scores,
        q.shape[2],
        k.shape[2],
        topk=topk,
        fraction=fraction,
        top_p=top_p,
        block_q=block_q,
        block_k=block_k,
        min_blocks=min_blocks,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        diagonal=diagonal,
        causal=causal,
        window=window,
    )
