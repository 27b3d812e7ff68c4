"""Rival kernels, each behind one function; a peer that is not installed is named once and left out.

Peers that need no packing: torch SDPA (cuDNN, flash, default backends) and FlexAttention.
Optional: flash-attn-4 (CuTe DSL) and nvidia-cudnn-frontend's block-sparse attention.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Run = Callable[[], object]
_missing: set[str] = set()


def _optional(name: str, load: Callable[[], object]):
    try:
        return load()
    except Exception as error:  # any failure to import means the peer is absent here
        if name not in _missing:
            _missing.add(name)
            text = f"{type(error).__name__}: {str(error)[:120]}"
            print(f"# {name} left out: {text}", file=sys.stderr)
        return None


def _fa4():
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    return flash_attn_func, BlockSparseTensorsTorch


def _cudnn_bsa():
    from cudnn.block_sparse_attention import BSA

    return BSA


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Run:
    def run():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return run


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Run]:
    """Dense forward peers of [B, H, S, D] tensors."""
    if not q.is_cuda:
        return {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)}
    runs = {
        "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v, causal),
        "fa2": _sdpa(SDPBackend.FLASH_ATTENTION, q, k, v, causal),
    }
    fa4 = _optional("fa4", _fa4)
    if fa4:
        qs, ks, vs = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        runs["fa4"] = lambda: fa4[0](qs, ks, vs, causal=causal)
    return runs


def decode(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Run]:
    """Attention of one new row per sequence over all of a contiguous cache."""
    return {
        "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v, False),
        "fa2": _sdpa(SDPBackend.FLASH_ATTENTION, q, k, v, False),
    }


def block_sparse(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, block_q: int, block_k: int
) -> dict[str, Run]:
    """Full-block lists int32 [1, H, nQ, kept], non-causal. Above 64k keys cuDNN's alone."""
    runs: dict[str, Run] = {}
    kept, n_k = lists.shape[-1], k.shape[2] // block_k
    bsa = _optional("cudnn-bsa", _cudnn_bsa) if block_q == block_k else None
    long = k.shape[2] > 65536
    if bsa:
        runs["cudnn-bsa"] = lambda: bsa.block_sparse_attention_forward(
            q, k, v, lists, kept, sparse_block_size=block_q, kv_splits=1
        )
    if bsa and block_q == 64 and long:
        runs["cudnn-bsa-split"] = lambda: bsa.block_sparse_attention_forward(
            q, k, v, lists, kept, sparse_block_size=block_q, kv_splits="auto"
        )
    if block_q != 128 or long:
        return runs
    counts = torch.full(lists.shape[:3], kept, device=q.device, dtype=torch.int32)
    padded = torch.zeros(*lists.shape[:3], n_k, device=q.device, dtype=torch.int32)
    padded[..., :kept] = lists
    zero_counts, zeros = torch.zeros_like(counts), torch.zeros_like(padded)
    fa4 = _optional("fa4", _fa4)
    if fa4:
        qs, ks, vs = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        index = fa4[1](
            mask_block_cnt=zero_counts,
            mask_block_idx=zeros,
            full_block_cnt=counts,
            full_block_idx=padded,
            block_size=(block_q, block_k),
        )
        runs["fa4"] = lambda: fa4[0](qs, ks, vs, block_sparse_tensors=index)
    if q.shape[3] == 128 and block_k == 128:
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        flex = torch.compile(flex_attention)
        mask = BlockMask.from_kv_blocks(zero_counts, zeros, counts, padded, BLOCK_SIZE=block_q)
        runs["flex"] = lambda: flex(q, k, v, block_mask=mask)
    return runs


def causal_gqa(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, below: Tensor, block: int
) -> dict[str, Run]:
    """Causal; full blocks `below` the diagonal int32 [1, H, n, n], and the diagonal block."""
    fa4 = _optional("fa4", _fa4)
    if not fa4:
        return {}
    diagonal = torch.zeros_like(below)
    diagonal[..., 0] = torch.arange(counts.shape[2], device=q.device, dtype=torch.int32)
    index = fa4[1](
        mask_block_cnt=torch.ones_like(counts),
        mask_block_idx=diagonal,
        full_block_cnt=counts,
        full_block_idx=below,
        block_size=(block, block),
    )
    qs, ks, vs = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return {"fa4": lambda: fa4[0](qs, ks, vs, causal=True, block_sparse_tensors=index)}
