"""The oracle of estimate_block_scores: int32 products in NumPy, float32 where the definition is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from attnsieve._reference_quantize import _scale_of_rows
from attnsieve._reference_selection import Window, visible_mask
from attnsieve.ops_quantize import QuantizedBlocks

Sequence = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _sequences(rows: QuantizedBlocks, of_rows: Tensor | None = None) -> list[Sequence]:
    """Per sequence int32 codes ``[H, S, D]``, the scales of rows and their ``of_rows``."""
    codes = rows.unpacked().cpu().numpy().astype(np.int32)
    scales = rows.scales.cpu().numpy()
    numbers = None if of_rows is None else of_rows.cpu().numpy()
    found = []
    if rows.cu_seqlens is None:
        of_row, _ = _scale_of_rows(codes.shape[2], rows.scale_rows)
        for b in range(codes.shape[0]):
            found.append((codes[b], scales[b][:, of_row], None if numbers is None else numbers[b]))
        return found
    chunk_rows, each = {"query_pairs": (16, 8), "key_quads": (32, 4)}.get(
        rows.scale_rows, (rows.scale_rows, 1)
    )
    offsets = rows.cu_seqlens.tolist()
    for b, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        of_row, _ = _scale_of_rows(end - begin, rows.scale_rows)
        own = scales[:, of_row + (begin // chunk_rows + b) * each]
        own_numbers = None if numbers is None else numbers[begin:end].T
        found.append((codes[begin:end].swapaxes(0, 1), own, own_numbers))
    return found


def estimate_block_scores(
    q: QuantizedBlocks,
    k: QuantizedBlocks,
    *,
    threshold: Tensor | None = None,
    block_q: int = 64,
    block_k: int = 64,
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
    """Every pair on its own; arguments and results of :func:`attnsieve.estimate_block_scores`.

    A maximum of float32 numbers that rounded one by one: as scales are not negative and rounding
    keeps the order, it is the rounded number of the greatest integer. Sums are float64.
    """
    of_q, of_k = _sequences(q, threshold), _sequences(k)
    dtype = np.float32 if reduce == "max" else np.float64
    nothing = -np.inf if reduce == "max" else 0.0
    heads, kv_heads = (rows.codes.shape[1] for rows in (q, k))
    group, head_dim = heads // kv_heads, of_q[0][0].shape[2] if of_q else 0
    if q.cu_seqlens is None:
        most_rows = q.codes.shape[2]
        most_keys = seqlen_k if key_pool > 1 else k.codes.shape[2]
    else:
        most_rows, most_keys = max_seqlen_q, max_seqlen_k
    rows, columns = -(-most_rows // block_q), -(-most_keys // block_k)
    scale = np.float32((head_dim or 1) ** -0.5 if softmax_scale is None else softmax_scale)
    found = np.full((len(of_q), heads, rows, columns), nothing, dtype)
    # Keys of 4 bits are the upper halves of bytes: 16 times as much, their scales a sixteenth.
    upper = np.int32(16 if k.bits == 4 else 1)
    for b, ((q_codes, q_scale, limits), (k_codes, k_scale, _)) in enumerate(
        zip(of_q, of_k, strict=True)
    ):
        seqlen_q, pools = q_codes.shape[1], k_codes.shape[1]
        keys = pools if key_pool == 1 else seqlen_k
        seen = visible_mask(seqlen_q, keys, causal=causal, window=window).cpu().numpy()
        seen = np.pad(seen, ((0, 0), (0, pools * key_pool - keys)))
        seen = seen.reshape(seqlen_q, pools, key_pool).any(2)
        seen = seen & (np.arange(seqlen_q) % row_stride == 0)[:, None]
        for h in range(heads):
            products = (q_codes[h] @ (k_codes[h // group] * upper).T).astype(np.float32)
            factors = (q_scale[h] * scale)[:, None] * (k_scale[h // group] / np.float32(upper))[
                None
            ]
            values = products * factors
            if limits is not None:
                values = values - limits[h][:, None]
            for i, j in np.ndindex(rows, columns):
                of_block = np.s_[
                    i * block_q : (i + 1) * block_q,
                    j * block_k // key_pool : (j + 1) * block_k // key_pool,
                ]
                own = values[of_block][seen[of_block]]
                if own.size:
                    found[b, h, i, j] = (
                        own.max() if reduce == "max" else np.exp(own.astype(np.float64)).sum()
                    )
    if reduce_group:
        found = found.reshape(-1, kv_heads, group, rows, columns)
        found = found.max(2) if reduce == "max" else found.sum(2)
    if not bits:
        return torch.from_numpy(found).to(q.codes.device)
    keep = np.zeros((len(of_q), found.shape[1], rows, -(-columns // 32) * 32), np.uint64)
    keep[..., :columns] = ~(found <= 0)
    words = (keep.reshape(*keep.shape[:-1], -1, 32) << np.arange(32, dtype=np.uint64)).sum(-1)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32)).to(q.codes.device)
