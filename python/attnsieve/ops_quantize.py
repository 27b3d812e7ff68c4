"""Low-bit codes of rows: the storage that estimates of block scores read.

``B`` batch, ``H`` heads, ``S`` rows of a sequence, ``T`` rows of all packed sequences, ``D`` head
dim. The oracle is :func:`attnsieve.reference.quantize_blocks`, with the same arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve._arguments import call_op, require_tensor

__all__ = ["QuantizedBlocks", "quantize_blocks"]

# The enum of include/attnsieve/estimate.h: rows and scales of a chunk of rows.
_FRAGMENTS = {"query_pairs": (1, 16, 8), "key_quads": (2, 32, 4)}


@dataclass(frozen=True)
class QuantizedBlocks:
    """Rows ``y = x - mean`` as ``codes * scale``.

    Attributes:
        codes: int8 ``[B, H, S, D]`` (packed sequences ``[T, H, D]``), from -127 to 127; with 4 bits
            uint8 ``[..., D / 2]``, from -7 to 7: of every 32 codes, byte i of 16 holds code i in
            its upper and code i + 16 in its lower half.
        scales: float32 ``[B, H, scales]`` (packed ``[H, scales]``). 0 where the codes stand for
            zeros, NaN where a number was not finite; the codes are 0 in both cases.
        mean: float32 ``[B, H, D]``, or None.
        bits: 8 or 4.
        scale_rows: which rows share a scale, as given to :func:`quantize_blocks`.
        cu_seqlens: int32 ``[B + 1]`` of packed sequences, or None.
        smoothed: y itself, in x's dtype and shape, or None.
    """

    codes: Tensor
    scales: Tensor
    mean: Tensor | None
    bits: int
    scale_rows: int | str
    cu_seqlens: Tensor | None = None
    smoothed: Tensor | None = None

    def unpacked(self) -> Tensor:
        """The codes as int8 ``[..., D]``."""
        if self.bits == 8:
            return self.codes
        halves = self.codes.unflatten(-1, (-1, 1, 16))
        nibbles = torch.cat([halves >> 4, halves & 15], dim=-2).flatten(-3)
        return ((nibbles.to(torch.int8) ^ 8) - 8).to(torch.int8)


def quantize_blocks(
    x: Tensor,
    *,
    bits: int = 8,
    scale_rows: int | str = 1,
    smooth: bool = True,
    cu_seqlens: Tensor | None = None,
    return_smoothed: bool = False,
) -> QuantizedBlocks:
    """Symmetric integer codes of queries or keys, with the mean of the sequence taken away first.

    For the rows that share a scale and ``y = x - mean``: ``magnitude = max |y|``,
    ``codes = round(y * (largest / magnitude))`` with largest 127 or 7, ``scale = magnitude /
    largest``, in float32 and rounded to nearest even. Bitwise the same on every backend, the mean
    included, whose sum has a fixed order.

    A mean of keys moves all logits of a row alike and leaves the softmax what it is; one of queries
    moves the logits of a key by ``mean . key``, which an estimate has to add.

    Args:
        x: ``[B, H, S, D]``, or with ``cu_seqlens`` ``[T, H, D]``; float16, bfloat16 or float32,
            rows 16-byte aligned; D a multiple of 8 up to 256, with 4 bits of 32.
        bits: 8 or 4 (packed).
        scale_rows: rows that share a scale. An integer n in {1, 2, 4 ... 128}: blocks of n rows.
            "query_pairs": rows r and r + 8 of every 16; "key_quads": of every 32 the 8 rows with
            the same ``row % 8 // 2``. The last two are SALE's (arXiv:2505.24179): what one lane of
            a warp holds of an MMA, so that its integer maximum has one scale.
        smooth: take the mean of each sequence and head away (SageAttention, SALE). Numbers that
            are not finite count as 0 in it.
        cu_seqlens: int32 ``[B + 1]``, ascending from 0 to T: packed sequences. The scales of
            sequence b, in chunks of c rows with g scales each (n rows and 1; 16 and 8; 32 and 4),
            begin at ``(cu_seqlens[b] // c + b) * g``; scales in between are 0.
        return_smoothed: also x less its mean, from the same pass over x; needs ``smooth``.

    Returns:
        :class:`QuantizedBlocks`. Rows whose magnitude is below 2**-119 become zeros with scale 0;
        if a number among them is not finite, codes 0 and scale NaN.

    Raises:
        ValueError: malformed argument, named in the text.
        NotImplementedError: dtype or head dim without a kernel; also when gradients are asked for.
    """
    require_tensor("x", x)
    if bits not in (4, 8):
        raise ValueError(f"bits: expected 4 or 8, got {bits!r}")
    if isinstance(scale_rows, str):
        if scale_rows not in _FRAGMENTS:
            raise ValueError(
                f"scale_rows: expected an integer or one of {list(_FRAGMENTS)}, got {scale_rows!r}"
            )
        kind, block_rows = _FRAGMENTS[scale_rows][0], 1
    else:
        kind, block_rows = 0, scale_rows
        if block_rows not in (1, 2, 4, 8, 16, 32, 64, 128):
            raise ValueError(f"scale_rows: expected a power of two up to 128, got {scale_rows!r}")
    if return_smoothed and not smooth:
        raise ValueError("return_smoothed: nothing is taken away without smooth")
    smoothed = torch.empty_like(x) if return_smoothed else None
    codes, scales, mean = call_op(
        torch.ops.attnsieve.quantize_blocks.default,
        x,
        cu_seqlens,
        bits,
        kind,
        block_rows,
        smooth,
        smoothed,
    )
    mean = mean if smooth else None
    return QuantizedBlocks(codes, scales, mean, bits, scale_rows, cu_seqlens, smoothed)
