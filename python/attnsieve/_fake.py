"""Fake kernels of every op: shapes, dtypes and strides without data."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _attend_out(q: Tensor) -> Tensor:
    # Repeats allocate_out of python/bindings/layout.h.
    if q.dim() == 4:
        batch, heads, rows, head_dim = q.shape
        if heads > 1 and rows > 1 and q.stride(1) < q.stride(2) and q.stride(1) != 0:
            strides = (rows * heads * head_dim, head_dim, heads * head_dim, 1)
            return q.new_empty_strided(q.shape, strides)
    return q.new_empty(q.shape)


@torch.library.register_fake("attnsieve::attend")
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor | None,
    columns: Tensor | None,
    block_q: int,
    block_k: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    sink: Tensor | None,
    threshold: float | None,
    threshold_per_head: Tensor | None,
    skip_block: int,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if cu_seqlens_q is not None:
        batch, heads = cu_seqlens_q.shape[0] - 1, q.shape[1]
        lse_shape = (q.shape[0], heads)
    else:
        batch, heads = q.shape[0], q.shape[1]
        lse_shape = (batch, heads, q.shape[2])
    voted = threshold is not None or threshold_per_head is not None
    counters = q.new_empty((batch, heads, 2) if voted else (0,), dtype=torch.int64)
    return _attend_out(q), q.new_empty(lse_shape, dtype=torch.float32), counters


@torch.library.register_fake("attnsieve::decode")
def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    indices: Tensor | None,
    counts: Tensor | None,
    index_page_size: int,
    physical: bool,
    dense_begin: Tensor | None,
    recent: int,
    sink: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    softmax_scale: float,
    causal: bool,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    return _attend_out(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("attnsieve::threshold_decode")
def _threshold_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    sink: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    threshold: float | None,
    threshold_per_head: Tensor | None,
    skip_block: int,
    num_splits: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    counters = q.new_empty((*q.shape[:2], 2), dtype=torch.int64)
    return _attend_out(q), q.new_empty(q.shape[:3], dtype=torch.float32), counters


@torch.library.register_fake("attnsieve::proxy_scores")
def _proxy_scores(
    q: Tensor,
    keys: Tensor,
    key_scale: Tensor | None,
    projection: Tensor | None,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    element: int,
    row_reduce: int,
    softmax: bool,
    head_reduce: int,
    num_out_heads: int,
    head_weights: Tensor | None,
    page_reduce: int,
    page_size: int,
    skip_first: int,
    skip_last: int,
    causal: bool,
    score_scale: float,
) -> Tensor:
    # The enums of include/attnsieve/problem.h: element 2 is bounds, reduction 0 is none.
    bounds = element == 2
    if block_table is not None:
        units = block_table.shape[1] * (1 if bounds else keys.shape[1])
    else:
        units = keys.shape[1 if bounds else 2]
    columns = units if page_reduce == 0 else (units + page_size - 1) // page_size
    rows = q.shape[2:3] if row_reduce == 0 else ()
    return q.new_empty((q.shape[0], *rows, num_out_heads, columns), dtype=torch.float32)


@torch.library.register_fake("attnsieve::append_kv")
def _append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    cu_seqlens: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    bounds: Tensor | None,
    bounds_page_size: int,
    projection: Tensor | None,
    proxy: Tensor | None,
) -> None:
    pass


@torch.library.register_fake("attnsieve::merge_states")
def _merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


@torch.library.register_fake("attnsieve::select_blocks")
def _select_blocks(
    scores: Tensor,
    seqlen_q: int,
    seqlen_k: int,
    block_q: int,
    block_k: int,
    topk: int | None,
    fraction: float | None,
    top_p: float | None,
    min_blocks: int,
    sink_blocks: int,
    local_blocks: int,
    diagonal: bool,
    causal: bool,
    window_left: int,
    window_right: int,
) -> tuple[Tensor, Tensor]:
    # Repeats capacity_of of python/bindings/small_ops.cpp.
    batch, heads, rows, num_k_blocks = scores.shape
    forced = sink_blocks + local_blocks + block_q // block_k + 2
    kept = num_k_blocks
    if topk is not None:
        kept = topk
    elif fraction is not None:
        kept = max(min_blocks, math.ceil(fraction * num_k_blocks))
    capacity = min(num_k_blocks, max(kept, forced))
    counts = scores.new_empty((batch, heads, rows), dtype=torch.int32)
    return counts, scores.new_empty((batch, heads, rows, capacity), dtype=torch.int32)


@torch.library.register_fake("attnsieve::select_marked")
def _select_marked(
    bits: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqlen_q: int,
    seqlen_k: int,
    block_q: int,
    block_k: int,
    capacity: int | None,
    sink_blocks: int,
    local_blocks: int,
    diagonal: bool,
    causal: bool,
    window_left: int,
    window_right: int,
) -> tuple[Tensor, Tensor]:
    shape = bits.shape[:3]
    room = (seqlen_k + block_k - 1) // block_k
    if capacity is not None:
        room = min(capacity, room)
    return bits.new_empty(shape), bits.new_empty((*shape, room))


@torch.library.register_fake("attnsieve::select_topk")
def _select_topk(
    scores: Tensor,
    seq_lens: Tensor | None,
    k: int,
    page_size: int,
    sink: int,
    recent: int,
    causal: bool,
    block_table: Tensor | None,
    table_page_size: int,
    num_pages: int,
) -> tuple[Tensor, Tensor]:
    shape = scores.shape[:-1]
    indices = scores.new_empty((*shape, k), dtype=torch.int32)
    return indices, scores.new_empty(shape, dtype=torch.int32)


@torch.library.register_fake("attnsieve::select_threshold")
def _select_threshold(
    scores: Tensor,
    seq_lens: Tensor | None,
    threshold: float | None,
    threshold_per_head: Tensor | None,
    capacity: int,
    page_size: int,
    sink: int,
    recent: int,
    causal: bool,
    block_table: Tensor | None,
    table_page_size: int,
    num_pages: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = scores.shape[:-1]
    indices = scores.new_empty((*shape, capacity), dtype=torch.int32)
    counts, passed = (scores.new_empty(shape, dtype=torch.int32) for _ in range(2))
    return indices, counts, passed


@torch.library.register_fake("attnsieve::quantize_blocks")
def _quantize_blocks(
    x: Tensor,
    cu_seqlens: Tensor | None,
    bits: int,
    scale_rows: int,
    block_rows: int,
    smooth: bool,
    smoothed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    packed = cu_seqlens is not None
    batch = cu_seqlens.shape[0] - 1 if packed else x.shape[0]
    heads, rows, head_dim = x.shape[1], x.shape[0 if packed else 2], x.shape[-1]
    # Repeats ScaleLayout of include/attnsieve/estimate.h.
    chunk_rows, per_chunk = ((block_rows, 1), (16, 8), (32, 4))[scale_rows]
    chunks = rows // chunk_rows + batch if packed else (rows + chunk_rows - 1) // chunk_rows
    shape = (heads, chunks * per_chunk) if packed else (batch, heads, chunks * per_chunk)
    dtype, width = (torch.uint8, head_dim // 2) if bits == 4 else (torch.int8, head_dim)
    return (
        x.new_empty((*x.shape[:-1], width), dtype=dtype),
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty((batch, heads, head_dim) if smooth else (0,), dtype=torch.float32),
    )


@torch.library.register_fake("attnsieve::fetch_tokens")
def _fetch_tokens(
    indices: Tensor,
    counts: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    first_new: Tensor | None,
    moved: Tensor | None,
) -> Tensor:
    return torch.empty_like(indices)


@torch.library.register_fake("attnsieve::estimate_block_scores")
def _estimate_block_scores(
    q_codes: Tensor,
    q_scales: Tensor,
    q_scale_rows: int,
    q_block_rows: int,
    k_codes: Tensor,
    k_scales: Tensor,
    k_scale_rows: int,
    k_block_rows: int,
    threshold: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqlen_q: int,
    seqlen_k: int,
    block_q: int,
    block_k: int,
    row_stride: int,
    key_pool: int,
    sum: bool,
    bits: bool,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
) -> Tensor:
    packed = cu_seqlens_q is not None
    batch = cu_seqlens_q.shape[0] - 1 if packed else q_codes.shape[0]
    rows = (seqlen_q + block_q - 1) // block_q
    keys = (seqlen_k + key_pool - 1) // key_pool
    columns = (keys + block_k - 1) // block_k
    if bits:
        columns = (columns + 31) // 32
    dtype = torch.int32 if bits else torch.float32
    return q_codes.new_empty((batch, q_codes.shape[1], rows, columns), dtype=dtype)
