"""The public attention functions: meaning of arguments, defaults, readable errors.

Shapes: ``B`` batch, ``Hq`` query heads, ``Hkv`` key/value heads (``Hq % Hkv == 0``; query head
``h`` uses KV head ``h // (Hq // Hkv)``), ``Sq``/``Sk`` sequence lengths, ``D`` head dim,
``nQ``/``nK`` number of q and KV blocks. Functions run on the current stream of the tensors' device,
do not synchronise, and can be captured into a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnsieve._arguments import (
    DEFAULT_BLOCK,
    Window,
    call_op,
    check_values,
    default_scale,
    window_sides,
)
from attnsieve.index import BlockIndex

__all__ = [
    "block_sparse_attention",
    "merge_states",
]

SKIP_BLOCK = 128  # keys of a tile, where the caller does not say


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex | None,
    threshold: float | None,
    threshold_per_head: Tensor | None,
    skip_block: int,
    causal: bool,
    window: Window | None,
    softmax_scale: float | None,
    sink: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op behind the public functions: (out, lse, counters)."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if index is not None and not isinstance(index, BlockIndex):
        raise TypeError(f"index: expected a BlockIndex or None, got {type(index).__name__}")
    if validate:
        check_values(q, k, index, cu_seqlens_q, cu_seqlens_k, block_table, seq_lens)
    scale = default_scale(q, softmax_scale)
    left, right = window_sides(window)
    return call_op(
        torch.ops.attnsieve.attend.default,
        q,
        k,
        v,
        None if index is None else index.counts,
        None if index is None else index.columns,
        DEFAULT_BLOCK if index is None else index.block_q,
        DEFAULT_BLOCK if index is None else index.block_k,
        cu_seqlens_q,
        cu_seqlens_k,
        block_table,
        seq_lens,
        sink,
        threshold,
        threshold_per_head,
        skip_block,
        scale,
        causal,
        left,
        right,
    )


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex | None = None,
    *,
    causal: bool = False,
    window: Window | None = None,
    softmax_scale: float | None = None,
    sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    validate: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention over the KV blocks of ``index`` (all of them without one).

    Block-sparse FlashAttention: for every row of q-blocks only the listed KV blocks are loaded.

    Args:
        q: ``[B, Hq, Sq, D]``, or ``[Tq, Hq, D]`` with ``cu_seqlens``. float16 or bfloat16; float32
            on CPU too. Any strides with a contiguous last dimension and 16-byte aligned rows, so
            ``[B, S, H, D]`` data is passed as ``.transpose(1, 2)`` without a copy.
        k, v: ``[B, Hkv, Sk, D]`` or ``[Tk, Hkv, D]``, dtype and device of q; with ``block_table``
            a cache of pages ``[num_pages, page_size, Hkv, D]``, ``page_size`` a multiple of 16.
        index: which KV blocks each q-block attends to; ``block_q`` 64 or 128 with ``block_k`` 16,
            32, 64 or 128. Its list heads are Hq, Hkv or 1; heads that share a list may be computed
            together, so results equal those over repeated lists within rounding. Rows are
            intersected with the masks below.
        causal: query row i sees keys ``j <= i + Sk - Sq`` (bottom-right).
        window: ``(left, right)`` keys around the same diagonal, -1 for no limit. With ``causal``
            the right side is 0.
        softmax_scale: positive; default ``1 / sqrt(D)``.
        sink: float32 ``[Hq]``: one more logit per row that has no value (attention sink as in
            gpt-oss). Not scaled.
        cu_seqlens_q, cu_seqlens_k: int32 ``[B + 1]`` token offsets of packed sequences, ascending
            from 0 to the number of tokens. ``index`` then counts q-blocks from each sequence's
            start; rows past the index attend to nothing.
        block_table: int32 ``[B, max_pages]``, the pages of each sequence (as in vLLM): key j of
            sequence b is row ``j % page_size`` of page ``block_table[b, j // page_size]``. With q
            varlen give ``cu_seqlens_q`` alone. Keys behind an entry outside ``[0, num_pages)`` are
            masked; entries past the sequence are never read. ``index`` counts KV blocks in key
            positions, nK = ceil(max_pages * page_size / block_k).
        seq_lens: int32 ``[B]``, keys of each sequence, clamped to ``[0, max_pages * page_size]``;
            Sk of the masks above. Given with ``block_table``.
        validate: check ``index``, ``cu_seqlens``, ``block_table`` and ``seq_lens`` on the host
            first (synchronises).
        return_lse: also return the log-sum-exp.

    Returns:
        ``out`` like q, or ``(out, lse)`` with ``lse`` float32 ``[B, Hq, Sq]``, varlen
        ``[Tq, Hq]``: natural logarithm, sink included. A row with nothing to attend to gives 0 and
        -inf (with a sink: 0 and the sink).

    Raises:
        ValueError: malformed argument, named in the text; with ``validate`` also a bad index.
        NotImplementedError: dtype or head dim without a kernel; the text lists the supported set.
            Also when gradients are asked for: there is no backward yet.
    """
    out, lse, _ = attend(
        q,
        k,
        v,
        index,
        None,
        None,
        SKIP_BLOCK,
        causal,
        window,
        softmax_scale,
        sink,
        cu_seqlens_q,
        cu_seqlens_k,
        block_table,
        seq_lens,
        validate,
    )
    return (out, lse) if return_lse else out


def merge_states(outs: Tensor | list[Tensor], lses: Tensor | list[Tensor]) -> tuple[Tensor, Tensor]:
    """Combines attention results over disjoint key sets by their log-sum-exp (split KV, cascades).

    Args:
        outs: ``[N, ..., D]``, or a list of N tensors ``[..., D]``; float32, float16 or bfloat16,
            ``D`` a multiple of 8.
        lses: float32 ``[N, ...]``, natural logarithm, or a list of N tensors ``[...]``.

    Returns:
        ``(out [..., D], lse [...])``: the attention over the union. A state with ``lse = -inf``
        contributes nothing whatever its values; if all are -inf (or N = 0): 0 and -inf.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        NotImplementedError: dtype or head dim without a kernel.
    """
    if isinstance(outs, list | tuple):
        outs = torch.stack(outs)
    if isinstance(lses, list | tuple):
        lses = torch.stack(lses)
    return call_op(torch.ops.attnsieve.merge_states.default, outs, lses)
