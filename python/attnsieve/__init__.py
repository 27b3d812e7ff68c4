"""attnsieve: sparse attention kernels that compute only what the scores say matters.

Score cheaply, select, attend exactly: the functions below are that sentence in parts. Everything
runs on CPU and on NVIDIA GPUs with the same semantics.
"""

from __future__ import annotations

from attnsieve._library import info_module as _info_module
from attnsieve._library import load_ops as _load_ops

_load_ops()

from attnsieve import _fake as _fake  # noqa: E402  (registers on the ops loaded above)
from attnsieve.cache import CachedKV, PagedKVCache  # noqa: E402  (after the ops)
from attnsieve.index import BlockIndex  # noqa: E402  (after the ops)
from attnsieve.lowrank import LowRankFit, lowrank_fit, lowrank_step  # noqa: E402  (after the ops)
from attnsieve.offload import WorkingSet, host_cache  # noqa: E402  (after the ops)
from attnsieve.ops import (  # noqa: E402  (after the ops)
    block_sparse_attention,
    merge_states,
)
from attnsieve.ops_cache import append_kv, proxy_scores  # noqa: E402  (after the ops)
from attnsieve.ops_decode import (  # noqa: E402  (after the ops)
    decode,
    select_threshold,
    select_topk,
)
from attnsieve.ops_estimate import (  # noqa: E402  (after the ops)
    estimate_block_scores,
    quantized_estimate_attention,
    select_estimated,
)
from attnsieve.ops_lowrank import low_rank_attention  # noqa: E402  (after the ops)
from attnsieve.ops_quantize import QuantizedBlocks, quantize_blocks  # noqa: E402  (after the ops)
from attnsieve.ops_threshold import (  # noqa: E402  (after the ops)
    threshold_attention,
    threshold_splits,
)
from attnsieve.ops_topk import topk_attention  # noqa: E402  (after the ops)
from attnsieve.selection import (  # noqa: E402  (after the ops)
    pooled_block_scores,
    select_blocks,
    select_from_scores,
    select_marked,
)
from attnsieve.token_index import TokenIndex  # noqa: E402  (after the ops)

__version__ = "0.1.0"

__all__ = [
    "BlockIndex",
    "CachedKV",
    "LowRankFit",
    "PagedKVCache",
    "QuantizedBlocks",
    "TokenIndex",
    "WorkingSet",
    "append_kv",
    "block_sparse_attention",
    "build_info",
    "capabilities",
    "decode",
    "estimate_block_scores",
    "host_cache",
    "kernel_attributes",
    "low_rank_attention",
    "lowrank_fit",
    "lowrank_step",
    "merge_states",
    "pooled_block_scores",
    "proxy_scores",
    "quantize_blocks",
    "quantized_estimate_attention",
    "reference",
    "select_blocks",
    "select_estimated",
    "select_from_scores",
    "select_marked",
    "select_threshold",
    "select_topk",
    "threshold_attention",
    "threshold_splits",
    "topk_attention",
]


def build_info() -> dict[str, str]:
    """How this library was built: version, kernel_hash, compiler, cuda ("" without), archs,
    head_dims, torch_target (the oldest torch it runs on)."""
    return _info_module().build_info()


def capabilities() -> list[dict[str, str]]:
    """The capability table: op, backend, supported dtypes and head dims, features."""
    return _info_module().capabilities()


def kernel_attributes() -> list[dict[str, int | str]]:
    """Registers, local and shared memory in bytes, and CTAs per SM of every CUDA kernel.

    Raises:
        RuntimeError: there is no usable GPU, or this is a CPU-only build.
    """
    return _info_module().kernel_attributes()


def __getattr__(name: str):
    if name == "reference":  # the fp64 oracle is not needed to run a kernel
        import importlib

        return importlib.import_module("attnsieve.reference")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
