"""BlockIndex from and to FlexAttention's BlockMask. Imported on first use: FlexAttention is slow to
import."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from attnsieve.index import BlockIndex, index_of_candidates, used_slots


def index_from_block_mask(block_mask: BlockMask, causal: bool) -> BlockIndex:
    """See ``BlockIndex.from_flex``."""
    counts, columns = block_mask.kv_num_blocks, block_mask.kv_indices
    if not causal and counts.numel() and int(counts.max()) > 0:
        raise ValueError(
            "block_mask has partial blocks (kv_num_blocks > 0) and a BlockIndex cannot carry their "
            "mask_mod. Pass causal=True if causality is the only mask inside blocks, and call "
            "attention with causal=True"
        )
    block_q, block_k = block_mask.BLOCK_SIZE
    valid = used_slots(columns, counts)
    if block_mask.full_kv_num_blocks is not None:
        full = block_mask.full_kv_indices
        columns = torch.cat([full, columns], dim=-1)
        valid = torch.cat([used_slots(full, block_mask.full_kv_num_blocks), valid], dim=-1)
    num_k_blocks = -(-block_mask.seq_lengths[1] // block_k)
    index = index_of_candidates(columns, valid, num_k_blocks, block_q, block_k)
    # Canonical rows hold at most nK entries, so nothing is cut.
    columns = index.columns[..., :num_k_blocks].contiguous()
    return BlockIndex(index.counts, columns, block_q, block_k)


def block_mask_from_index(
    index: BlockIndex, seqlen_q: int, seqlen_k: int, causal: bool
) -> BlockMask:
    """See ``BlockIndex.to_flex``."""
    block_q, block_k, offset = index.block_q, index.block_k, seqlen_k - seqlen_q
    num_k_blocks = -(-seqlen_k // block_k)
    dense = index.to_dense(num_k_blocks)
    full = dense
    if causal:
        rows = torch.arange(index.num_rows, device=index.device).unsqueeze(-1)
        last_keys = (torch.arange(num_k_blocks, device=index.device) + 1) * block_k - 1
        full = dense & (last_keys.clamp(max=seqlen_k - 1) <= rows * block_q + offset)
    num_batches, num_lists = dense.shape[:2]

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        kept = dense[b % num_batches, h % num_lists, q_idx // block_q, kv_idx // block_k]
        return kept & (kv_idx <= q_idx + offset) if causal else kept

    full_lists = BlockIndex.from_dense(full, block_q, block_k)
    partial_lists = BlockIndex.from_dense(dense & ~full, block_q, block_k)
    return BlockMask.from_kv_blocks(
        partial_lists.counts,
        partial_lists.columns.clamp(min=0),
        full_lists.counts,
        full_lists.columns.clamp(min=0),
        BLOCK_SIZE=(block_q, block_k),
        mask_mod=mask_mod,
        seq_lengths=(seqlen_q, seqlen_k),
    )
