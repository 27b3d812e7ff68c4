"""SALE: blocks found by low-bit products of queries and keys (arXiv:2505.24179).

Estimates are compared with a row's weight on its sink and local keys. Unlike the public code,
causality is exact to the element, queries are not smoothed and have 8 bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve.index import BlockIndex
from attnsieve.methods.base import BlockMethod
from attnsieve.ops_estimate import LOCAL_TOKENS, SINK_TOKENS, select_estimated
from attnsieve.tau_calibration import TauCalibration


@functools.lru_cache(maxsize=1024)
def _on(device: torch.device, taus: tuple[float, ...]) -> Tensor:
    """Copied once: later calls neither wait nor hinder a CUDA graph."""
    return torch.tensor(taus, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class SALE(BlockMethod):
    """Keeps what some row weighs more than ``tau`` times its sink and local keys together.

    Defaults are the public code's: 4 bits, 64 query rows and 32 keys a block, the first 32 keys,
    the last 256, tau 0.004. Windows are not part of the method and are refused.

    Args:
        tau: a number for all heads, or for each layer a tuple with a number for each query head, as
            :meth:`calibrated` has them.
        bits, block_q, block_k, row_stride, sink_tokens, local_tokens: as in
            :func:`attnsieve.quantized_estimate_attention`.
    """

    tau: float | tuple[tuple[float, ...], ...] = 0.004
    bits: int = 4
    block_q: int = 64
    block_k: int = 32
    row_stride: int = 1
    sink_tokens: int = SINK_TOKENS
    local_tokens: int = LOCAL_TOKENS

    @classmethod
    def calibrated(cls, calibration: TauCalibration) -> SALE:
        """With the thresholds and options of a calibration."""
        return cls(tau=calibration.taus, **calibration.estimate)

    def _tau(self, device: torch.device, layer_idx: int | None, num_heads: int) -> float | Tensor:
        if not isinstance(self.tau, tuple):
            return self.tau
        if layer_idx is None or not 0 <= layer_idx < len(self.tau):
            raise ValueError(f"layer_idx: {layer_idx} is none of {len(self.tau)} calibrated layers")
        taus = self.tau[layer_idx]
        if len(taus) != num_heads:
            raise ValueError(f"q: {num_heads} heads, but tau is calibrated for {len(taus)}")
        return _on(device, taus)

    def select(
        self, q, k, *, causal, window=None, softmax_scale=None, layer_idx=None
    ) -> BlockIndex:
        if window is not None:
            raise NotImplementedError("SALE: window is not part of the method")
        return select_estimated(
            q,
            k,
            k,  # values do not enter the choice
            tau=self._tau(q.device, layer_idx, q.shape[1]),
            bits=self.bits,
            block_q=self.block_q,
            block_k=self.block_k,
            row_stride=self.row_stride,
            sink_tokens=self.sink_tokens,
            local_tokens=self.local_tokens,
            causal=causal,
            softmax_scale=softmax_scale,
        )
