"""The oracle of quantize_blocks: NumPy, float32 where the definition is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_SUM_ROWS, _SUM_LANES = 128, 16
_SMALLEST_MAGNITUDE = np.float32(2.0**-119)


def _sum_in_order(rows: np.ndarray) -> np.ndarray:
    """float32 sum over the first axis, of 128 rows at a time by 16 lanes each."""
    if len(rows) == 0:
        return np.zeros(rows.shape[1:], np.float32)
    while True:
        sums = []
        for begin in range(0, len(rows), _SUM_ROWS):
            lanes = np.zeros((_SUM_LANES, *rows.shape[1:]), np.float32)
            for row, x in enumerate(rows[begin : begin + _SUM_ROWS]):
                lanes[row % _SUM_LANES] += x
            total = lanes[0]
            for lane in lanes[1:]:
                total = total + lane
            sums.append(total)
        rows = np.stack(sums)
        if len(rows) == 1:
            return rows[0]


def _scale_of_rows(count: int, scale_rows: int | str) -> tuple[np.ndarray, int]:
    """For each row the number of its scale; how many scales there are."""
    rows = np.arange(count)
    if scale_rows == "query_pairs":
        return rows // 16 * 8 + rows % 8, -(-count // 16) * 8
    if scale_rows == "key_quads":
        return rows // 32 * 4 + rows % 8 // 2, -(-count // 32) * 4
    return rows // scale_rows, -(-count // scale_rows)


def _quantize_sequence(x: np.ndarray, bits: int, scale_rows: int | str, smooth: bool):
    """One sequence and head, float32 ``[S, D]``."""
    largest = np.float32(2 ** (bits - 1) - 1)
    mean = None
    if smooth:
        total = _sum_in_order(np.where(np.isfinite(x), x, np.float32(0)))
        mean = total / np.float32(max(len(x), 1))
        x = x - mean
    of_row, num_scales = _scale_of_rows(len(x), scale_rows)
    codes = np.zeros(x.shape, np.int8)
    scales = np.zeros(num_scales, np.float32)
    for i in range(num_scales):
        rows = np.nonzero(of_row == i)[0]
        if len(rows) == 0:
            continue
        magnitude = np.abs(x[rows]).max()
        if not np.isfinite(x[rows]).all():
            scales[i] = np.nan
        elif magnitude >= _SMALLEST_MAGNITUDE:
            scales[i] = magnitude / largest
            codes[rows] = np.rint(x[rows] * (largest / magnitude)).astype(np.int8)
    return codes, scales, mean


def quantize_blocks(
    x: Tensor,
    *,
    bits: int = 8,
    scale_rows: int | str = 1,
    smooth: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What :func:`attnsieve.quantize_blocks` returns, its codes as int8 ``[..., D]`` at 4 bits too.

    Returns:
        ``(codes, scales, mean)``.
    """
    numbers = x.float().cpu().numpy()
    chunk = {"query_pairs": (16, 8), "key_quads": (32, 4)}.get(scale_rows, (scale_rows, 1))
    heads, head_dim = x.shape[1], x.shape[-1]
    codes = np.zeros(numbers.shape, np.int8)
    if cu_seqlens is None:
        batch, rows = x.shape[0], x.shape[2]
        scales = np.zeros((batch, heads, -(-rows // chunk[0]) * chunk[1]), np.float32)
    else:
        offsets = cu_seqlens.tolist()
        batch = len(offsets) - 1
        scales = np.zeros((heads, (x.shape[0] // chunk[0] + batch) * chunk[1]), np.float32)
    mean = np.zeros((batch, heads, head_dim), np.float32)
    with np.errstate(all="ignore"):
        for b in range(batch):
            for h in range(heads):
                if cu_seqlens is None:
                    own, to, first = numbers[b, h], codes[b, h], 0
                    line = scales[b, h]
                else:
                    part = slice(offsets[b], offsets[b + 1])
                    own, to, line = numbers[part, h], codes[part, h], scales[h]
                    first = (offsets[b] // chunk[0] + b) * chunk[1]
                to[:], found, average = _quantize_sequence(own, bits, scale_rows, smooth)
                line[first : first + len(found)] = found
                if smooth:
                    mean[b, h] = average
    there = [torch.from_numpy(part).to(x.device) for part in (codes, scales, mean)]
    return there[0], there[1], there[2] if smooth else None
