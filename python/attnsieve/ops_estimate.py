"""Scores of blocks from low-bit products, and attention to the blocks they find.

``B`` batch, ``Hq`` and ``Hkv`` query and KV heads, ``Sq`` and ``Sk`` rows, ``Tq`` and ``Tk`` those
of all packed sequences, ``nQ`` and ``nK`` blocks of ``block_q`` and ``block_k`` of them, the last
one ragged. The oracle of the op is :func:`attnsieve.reference.estimate_block_scores`.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from attnsieve._arguments import DEFAULT_BLOCK, Window, call_op, default_scale, window_sides
from attnsieve.index import BlockIndex
from attnsieve.ops import block_sparse_attention
from attnsieve.ops_quantize import _FRAGMENTS, QuantizedBlocks, quantize_blocks
from attnsieve.selection import _pool, select_marked

__all__ = ["estimate_block_scores", "quantized_estimate_attention", "select_estimated"]

SINK_TOKENS, LOCAL_TOKENS = 32, 256  # SALE's


def estimate_block_scores(
    q: QuantizedBlocks,
    k: QuantizedBlocks,
    *,
    threshold: Tensor | None = None,
    block_q: int = DEFAULT_BLOCK,
    block_k: int = DEFAULT_BLOCK,
    row_stride: int = 1,
    key_pool: int = 1,
    reduce: str = "max",
    reduce_group: bool = False,
    bits: bool = False,
    softmax_scale: float | None = None,
    causal: bool = False,
    window: Window | None = None,
    seqlen_k: int | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """One number for each pair of blocks from the low-bit logits of its rows and keys.

    For q-block a and KV block b: the maximum of ``softmax_scale * q_i . k_j - threshold_i`` over
    the sampled rows i of a and the keys j of b that i sees, from codes and scales; or the sum of
    the exponentials of these numbers. Products are exact integers and the rest is float32 in a
    fixed order: every backend returns the same bits of a maximum, and of a sum the same within
    rounding. With ``threshold_i = lse_i + ln tau``, where lse is the log-sum-exp over sink and
    local keys, a maximum above 0 is SALE's rule for keeping a block (arXiv:2505.24179). With
    ``threshold_i`` the log-sum-exp of the row, sums are the attention that a block receives.

    Args:
        q: codes ``[B, Hq, Sq, D]``, or packed ``[Tq, Hq, D]``, with any ``scale_rows``; a mean that
            was taken away is not added again.
        k: codes ``[B, Hkv, Sk, D]``, or packed; scales per block of 16 rows or more, or
            "key_quads".
        threshold: float32 ``[B, Hq, Sq]``, packed ``[Tq, Hq]``, or None for 0.
        block_q: 64 or 128 rows; block_k: 16, 32, 64 or 128 times ``key_pool`` keys.
        row_stride: 1, 2, 4 or 8: of the query rows only 0, row_stride, 2 row_stride ... are
            looked at, which takes so many times less work.
        key_pool: 1, 2, 4 or 8: each row of k stands for so many keys, of which ``seqlen_k`` says
            the number; it is seen where one of them is. Not for packed sequences.
        reduce: "max" or "sum".
        reduce_group: over the query heads of a KV head too.
        bits: instead of the maxima a bit for each block, set where it is above 0 or NaN.
        softmax_scale: positive; default ``1 / sqrt(D)``.
        causal, window: as in :func:`attnsieve.block_sparse_attention`, exact to the element.
        max_seqlen_q, max_seqlen_k: packed: rows of the longest sequence, for which the result has
            room; longer ones are cut.

    Returns:
        float32 ``[B, H, nQ, nK]``, H = Hq or Hkv: where no sampled row sees a key the maximum is
        -inf and the sum 0; NaN where a scale is NaN. With ``bits`` int32
        ``[B, H, nQ, ceil(nK / 32)]``: block b is bit ``b % 32`` of word ``b // 32``.

    Raises:
        ValueError: malformed argument, named in the text.
        NotImplementedError: head dim without a kernel.
    """
    for name, rows in (("q", q), ("k", k)):
        if not isinstance(rows, QuantizedBlocks):
            raise TypeError(f"{name}: expected QuantizedBlocks, got {type(rows).__name__}")
    if reduce not in ("max", "sum"):
        raise ValueError(f'reduce: expected "max" or "sum", got {reduce!r}')
    if key_pool not in (1, 2, 4, 8) or block_k % key_pool:
        raise ValueError(f"key_pool: expected 1, 2, 4 or 8 that divides block_k, got {key_pool!r}")
    lengths = _lengths(q, k, key_pool, seqlen_k, max_seqlen_q, max_seqlen_k)
    if softmax_scale is None:
        softmax_scale = (q.codes.shape[-1] * 8 // q.bits) ** -0.5
    found = call_op(
        torch.ops.attnsieve.estimate_block_scores.default,
        *_coded(q),
        *_coded(k),
        threshold,
        q.cu_seqlens,
        k.cu_seqlens,
        *lengths,
        block_q,
        block_k // key_pool,
        row_stride,
        key_pool,
        reduce == "sum",
        bits,
        softmax_scale,
        causal,
        *window_sides(window),
    )
    if not reduce_group:
        return found
    groups = found.unflatten(1, (k.codes.shape[1], -1))
    if bits:
        return functools.reduce(torch.bitwise_or, groups.unbind(2))
    return groups.amax(2) if reduce == "max" else groups.sum(2)


def _coded(rows: QuantizedBlocks) -> tuple[Tensor, Tensor, int, int]:
    if isinstance(rows.scale_rows, str):
        return rows.codes, rows.scales, _FRAGMENTS[rows.scale_rows][0], 1
    return rows.codes, rows.scales, 0, rows.scale_rows


def _lengths(
    q: QuantizedBlocks,
    k: QuantizedBlocks,
    key_pool: int,
    seqlen_k: int | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> tuple[int, int]:
    """Rows and keys of a sequence; packed: of the longest."""
    if q.cu_seqlens is not None:
        for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
            if length is None:
                raise ValueError(f"{name}: must be given for packed sequences")
        if key_pool != 1:
            raise NotImplementedError("key_pool: packed sequences are not pooled")
        return max_seqlen_q, max_seqlen_k
    if max_seqlen_q is not None or max_seqlen_k is not None:
        raise ValueError("max_seqlen_q, max_seqlen_k: belong to packed sequences")
    rows = k.codes.shape[2]
    if seqlen_k is None:
        if key_pool != 1:
            raise ValueError("seqlen_k: must be given with key_pool")
        seqlen_k = rows
    if -(-seqlen_k // key_pool) != rows:
        raise ValueError(
            f"seqlen_k: expected the keys of {rows} rows of k, {key_pool} each, got {seqlen_k}"
        )
    return q.codes.shape[2], seqlen_k


def _project(x: Tensor, projection: Tensor) -> Tensor:
    """Rows of head h times the matrix of its KV head; heads are dimension 1."""
    each = projection.repeat_interleave(x.shape[1] // projection.shape[0], 0).to(x.dtype)
    if x.dim() == 3:
        return torch.bmm(x.transpose(0, 1), each).transpose(0, 1)
    return x @ each


def _log_tau(q: Tensor, tau: float | Tensor, packed: bool) -> float | Tensor:
    """What a row's log-sum-exp is raised by; a tensor's shape fits those of all rows."""
    if not isinstance(tau, Tensor):
        if not tau >= 0:
            raise ValueError(f"tau: expected a number >= 0, got {tau!r}")
        return math.log(tau) if tau > 0 else -math.inf
    if tau.shape != q.shape[1:2] or tau.dtype != torch.float32 or tau.device != q.device:
        raise ValueError(
            f"tau: expected a number or float32 [{q.shape[1]}] on {q.device}, got {tau.dtype} "
            f"{list(tau.shape)} on {tau.device}"
        )
    return tau.log() if packed else tau.log().unsqueeze(-1)


def select_estimated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tau: float | Tensor,
    bits: int = 4,
    block_q: int = DEFAULT_BLOCK,
    block_k: int = 32,
    row_stride: int = 1,
    key_pool: int = 1,
    projection: Tensor | None = None,
    sink_tokens: int = SINK_TOKENS,
    local_tokens: int = LOCAL_TOKENS,
    capacity: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> BlockIndex:
    """The blocks that :func:`quantized_estimate_attention` attends to; arguments are its.

    Four steps: keys without their mean, in k's dtype, and codes of them and of the queries; the
    log-sum-exp of each row over its sink and local keys, by exact attention; the low-bit estimate
    of what exceeds ``tau`` times that; lists of these blocks.
    """
    scale = default_scale(q, softmax_scale)
    packed = cu_seqlens_q is not None
    if packed != (cu_seqlens_k is not None):
        raise ValueError("cu_seqlens_q, cu_seqlens_k: must be given together")
    if packed and (max_seqlen_q is None or max_seqlen_k is None):
        raise ValueError("max_seqlen_q, max_seqlen_k: must be given for packed sequences")
    batch = cu_seqlens_q.shape[0] - 1 if packed else q.shape[0]
    rows, keys = (max_seqlen_q, max_seqlen_k) if packed else (q.shape[2], k.shape[2])
    sequences = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    options = dict(block_q=block_q, block_k=block_k, causal=causal)
    marking = functools.partial(
        select_marked,
        seqlen_q=rows,
        seqlen_k=keys,
        sink_blocks=-(-sink_tokens // block_k),
        local_blocks=max(0, -(-(local_tokens - block_q) // block_k)),
        diagonal=True,
        **options,
        **sequences,
    )

    coded = dict(bits=bits, scale_rows="key_quads", cu_seqlens=cu_seqlens_k)
    coded_k = quantize_blocks(k, return_smoothed=True, **coded)
    smooth_k = coded_k.smoothed
    estimated_q = q
    if projection is not None or key_pool != 1:
        estimated_k = smooth_k
        if projection is not None:
            estimated_q, estimated_k = _project(q, projection), _project(smooth_k, projection)
        if key_pool != 1 and not packed:
            estimated_k = _pool(estimated_k, key_pool)
        coded_k = quantize_blocks(estimated_k, smooth=False, **coded)

    words = (-(-keys // block_k) + 31) // 32
    none = torch.zeros((batch, 1, -(-rows // block_q), words), dtype=torch.int32, device=q.device)
    _, lse = block_sparse_attention(
        q,
        smooth_k,
        v,
        marking(none),
        causal=causal,
        softmax_scale=scale,
        return_lse=True,
        **sequences,
    )
    marked = estimate_block_scores(
        quantize_blocks(estimated_q, smooth=False, cu_seqlens=cu_seqlens_q),
        coded_k,
        threshold=lse + _log_tau(q, tau, packed),
        row_stride=row_stride,
        key_pool=key_pool,
        seqlen_k=None if packed else keys,
        bits=True,
        softmax_scale=scale,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        **options,
    )
    return marking(marked, capacity=capacity)


def quantized_estimate_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tau: float | Tensor,
    bits: int = 4,
    block_q: int = DEFAULT_BLOCK,
    block_k: int = 32,
    row_stride: int = 1,
    key_pool: int = 1,
    projection: Tensor | None = None,
    sink_tokens: int = SINK_TOKENS,
    local_tokens: int = LOCAL_TOKENS,
    capacity: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    return_index: bool = False,
    return_density: bool = False,
) -> Tensor | tuple:
    """Exact attention over the blocks that a low-bit estimate finds (SALE, arXiv:2505.24179).

    A block is kept iff some sampled row's estimated weight on one of its keys exceeds ``tau`` times
    the row's whole weight on sink and local keys. Those are kept always.

    Args:
        q: ``[B, Hq, Sq, D]``, or packed ``[Tq, Hq, D]``; k, v: ``[B, Hkv, Sk, D]`` or packed.
        tau: a number >= 0, or float32 ``[Hq]``: the more, the fewer blocks. 0 keeps every block,
            infinity none but sink and local ones.
        bits: of the keys' codes, 4 or 8; queries have 8.
        block_q: 64 or 128; block_k: 16, 32, 64 or 128, of which key_pool leaves at least 16.
        row_stride: 1, 2, 4 or 8: every how-manieth query row is looked at. Estimates take so many
            times less; what only rows in between need is missed.
        key_pool: 1, 2, 4 or 8 neighbouring keys are estimated by their mean. The same gain; a
            single key that stands out is missed among others. Not for packed sequences.
        projection: ``[Hkv, D, r]``, r a head dim with a kernel, or None: rows and keys are
            estimated after this product, such as with the r leading principal directions of a
            head's keys. Its columns should be orthonormal; estimates take r / D of the time.
        sink_tokens: the first keys; local_tokens: keys up to the end of the row's own block. Both
            are rounded up to blocks.
        capacity: room of a list, None for all blocks: see :func:`attnsieve.select_marked`. At 128k
            tokens and 32 heads a full list of 32-key blocks takes 1 GB.
        causal: as in :func:`attnsieve.block_sparse_attention`.
        softmax_scale: positive; default ``1 / sqrt(D)``.
        cu_seqlens_q, cu_seqlens_k: int32 ``[B + 1]`` of packed sequences, of which max_seqlen_q and
            max_seqlen_k are the longest.
        return_lse: also the log-sum-exp; return_index: also the :class:`BlockIndex`;
            return_density: also the kept share of the visible pairs, float64 on device
            (:meth:`BlockIndex.density`; not for packed sequences).

    Returns:
        ``out`` like q, then what was asked for.

    Raises:
        ValueError: malformed argument, named in the text.
        NotImplementedError: dtype or head dim without a kernel; also when gradients are asked for.
    """
    packed = cu_seqlens_q is not None
    if return_density and packed:
        raise NotImplementedError("return_density: not for packed sequences")
    index = select_estimated(
        q,
        k,
        v,
        tau=tau,
        bits=bits,
        block_q=block_q,
        block_k=block_k,
        row_stride=row_stride,
        key_pool=key_pool,
        projection=projection,
        sink_tokens=sink_tokens,
        local_tokens=local_tokens,
        capacity=capacity,
        causal=causal,
        softmax_scale=softmax_scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    out, lse = block_sparse_attention(
        q,
        k,
        v,
        index,
        causal=causal,
        softmax_scale=softmax_scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        return_lse=True,
    )
    results = [out]
    if return_lse:
        results.append(lse)
    if return_index:
        results.append(index)
    if return_density:
        results.append(index.density(q.shape[2], k.shape[2], causal=causal))
    return tuple(results) if len(results) > 1 else out
