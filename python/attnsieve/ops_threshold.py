"""Attention that skips tiles of keys whose logits can no longer matter, in prefill and in decode.

Letters as in :mod:`attnsieve.ops`. The float64 oracle is ``threshold_attention`` of
:mod:`attnsieve.reference`, with the same arguments.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnsieve._arguments import (
    Window,
    call_op,
    check_decode_values,
    check_head_scale,
    default_scale,
    key_scale_of,
    lambda_arguments,
    require_tensor,
)
from attnsieve.index import BlockIndex
from attnsieve.ops import SKIP_BLOCK, attend
from attnsieve.ops_cache import proxy_scores
from attnsieve.ops_decode import decode, select_threshold

if TYPE_CHECKING:
    from attnsieve.calibration import Calibration

__all__ = ["threshold_attention", "threshold_splits"]

_MAX_GROUP = 16  # kMaxDecodeGroup and kMaxDecodeSplits of include/attnsieve/problem.h
_MAX_SPLITS = 128
_SLOTS = 264  # CTAs that run at once: two on each of 132 SMs
_CTA_SPLITS = 4  # splits of one CTA
_SPLIT_TILES = 16  # at least, of which a split keeps one whatever the rule says


def threshold_splits(num_groups: int, capacity: int, skip_block: int = SKIP_BLOCK) -> int:
    """S, the visiting sequences that :func:`threshold_attention` deals a decode step's tiles to.

    A function of shapes alone, the same on every device: enough splits for every group of query
    vectors to fill a GPU of 132 SMs, four to a thread block, but no more than leave each 16 tiles
    of a full cache: a split keeps its first tile and knows the maxima of its own alone.

    Args:
        num_groups: ``B * Hkv * ceil(G / min(G, 16 // Sq))`` with ``G = Hq // Hkv``.
        capacity: keys that the cache has room for, per sequence.
        skip_block: keys of a tile.
    """
    num_groups = max(1, num_groups)
    per_group = max(1, _SLOTS // num_groups)  # thread blocks
    if num_groups > _SLOTS:
        per_group = min(range(1, 5), key=lambda n: -(-num_groups * n // _SLOTS) / n)
    longest = max(1, capacity // skip_block // _SPLIT_TILES)
    return min(_CTA_SPLITS * per_group, _MAX_SPLITS, longest)


def threshold_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    threshold: float | Tensor | None = None,
    *,
    phase: str = "prefill",
    target_sparsity: float | None = None,
    calibration: Calibration | str | os.PathLike | None = None,
    index: BlockIndex | None = None,
    skip_block: int = SKIP_BLOCK,
    two_phase: bool = False,
    num_splits: int | None = None,
    causal: bool = False,
    window: Window | None = None,
    softmax_scale: float | None = None,
    sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    validate: bool = False,
    return_lse: bool = False,
    return_counters: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Attention that skips KV tiles whose logits can no longer matter (BLASST, skip softmax).

    A tile of ``skip_block`` keys is skipped for a group of query vectors iff for every one of them
    ``m_tile - m_run < ln(lambda)``: scaled, masked logits, ``m_run`` the vector's running maximum
    over the tiles kept before. A vector that sees nothing in the tile does not hold it back, one
    with a NaN does. The first visited tile is never skipped. The result is renormalised over the
    kept tiles; ``sink`` takes no part in decisions.

    ``phase="prefill"``: a group is 64 query rows of one head. Without an index tiles are aligned in
    key position and the one with the group's last visible key comes first, then the others
    ascending. With one, the keys that a row of the index keeps, in list order and as far as any of
    its ``block_q`` query rows sees them, are cut from the start; the last tile, which takes the
    remainder, comes first, then the others ascending, each group leaving out tiles it sees nothing
    of.

    ``phase="decode"``: 1 to 8 new rows per sequence over a KV cache, whose last T keys include
    their own. A group is the query heads that share a KV head, with all rows: ``min(G, 16 // Sq)``
    neighbouring heads of the ``G = Hq // Hkv``. The tiles of T keys lie at multiples of
    ``skip_block``, the last one is visited first, then the others ascending. Visit p belongs to
    split ``p % num_splits``, and each split applies the rule to its own visits, the first of which
    it keeps. Keys behind missing pages are masked.

    Args:
        q: prefill ``[B, Hq, Sq, D]``, or ``[Tq, Hq, D]`` with ``cu_seqlens``; decode
            ``[B, Hq, Sq, D]`` with Sq <= 8. float16 or bfloat16; float32 on CPU too.
        k, v: prefill as in :func:`block_sparse_attention`; decode as ``k_cache``, ``v_cache`` of
            :func:`decode` (so named in errors): ``[B, Hkv, S, D]``, or with ``block_table`` pages
            ``[num_pages, page_size, Hkv, D]`` of any page_size; dtype of q or float8_e4m3fn codes.
        threshold: lambda, final (not a scale factor): a float >= 0, or float32 ``[]``, ``[B]``,
            ``[Hq]`` or ``[B or 1, Hq or 1]``; one dimension that could be either is refused. None
            is attention without skipping. 0 skips nothing, in prefill bitwise equal to None; values
            above 1 are legal. A NaN or negative number in a tensor skips nothing.
        phase: "prefill" or "decode".
        target_sparsity, calibration: instead of ``threshold``: lambda = F / keys of the sequence,
            F = ``calibration.scale(phase, target_sparsity)`` of an
            :class:`attnsieve.calibration.Calibration` or the path of one. Lengths are clamped to at
            least 1 and read on device.
        index: prefill: restricts the keys first, as in :func:`block_sparse_attention`.
        skip_block: 64 or 128 keys per tile; in prefill 64 alone for head_dim 256 on sm_90.
        two_phase: decode: maxima first, then decisions that no order enters: a tile is kept iff for
            some row of some query head of its KV head ``m_tile - m_all >= min(ln(lambda), 0)``,
            ``m_all`` the row's maximum over all it sees. Skips at least what one phase skips for
            groups of whole KV heads and lambda <= 1; reads K twice. NaN keeps every tile.
        num_splits: decode: 1 to 128 visiting sequences. Default: the calibration's, without one
            ``threshold_splits(B * Hkv * ceil(G / min(G, 16 // Sq)), capacity, skip_block)``, which
            depends on the batch size: pin it where results must not. A split keeps its first tile,
            so the fewer, the more is skipped. With ``two_phase``, and where
            ``threshold`` is None, it is that of :func:`decode`: no decision depends on it.
        causal: query row i sees keys ``j <= i + Sk - Sq`` (decode: T for Sk).
        window, cu_seqlens_q, cu_seqlens_k: prefill: as in :func:`block_sparse_attention`.
        softmax_scale: positive; default ``1 / sqrt(D)``.
        sink: float32 ``[Hq]``: one more logit per row that has no value. Not scaled.
        block_table: int32 ``[B, max_pages]``, pages of each sequence.
        seq_lens: int32 ``[B]``, keys of each sequence, clamped to ``[0, capacity]``. Given with
            ``block_table``; in decode also alone, for a contiguous cache.
        k_scale, v_scale: decode: float32 ``[Hkv]``, needed with codes: k is ``code * k_scale``.
        validate: check lengths, pages and ``index`` on the host first (synchronises).
        return_lse: also return the log-sum-exp.
        return_counters: also return int64 ``[B, Hq, 2]``: (skipped, total) tiles of each head, in
            decode those of its group, of all splits.

    Returns:
        ``out`` like q, or a tuple ``out[, lse][, counters]``. ``lse`` is float32 ``[B, Hq, Sq]``,
        varlen ``[Tq, Hq]``: natural logarithm over the kept keys, sink included. A row with nothing
        to attend to gives 0 and -inf (with a sink: 0 and the sink).

        Where q, k or v requires grad, prefill on the CPU computes with the float64 oracle: its
        decisions are constants, gradients flow through the kept pairs. For training; slow.

    Raises:
        TypeError, ValueError: malformed argument, or one of the other phase, named in the text;
            with ``validate`` also a bad value.
        NotImplementedError: no kernel for the device, dtype or head dim; or gradients are asked for
            on CUDA or in decode.

    The rule is that of BLASST (skip softmax attention), arXiv 2512.12087.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, tensor)
    _check_phase(
        phase,
        dict(index=index, window=window, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k),
        dict(two_phase=two_phase or None, num_splits=num_splits, k_scale=k_scale, v_scale=v_scale),
    )
    if target_sparsity is not None or calibration is not None:
        if threshold is not None or target_sparsity is None or calibration is None:
            raise ValueError(
                "target_sparsity, calibration: give both and no threshold, or neither of them"
            )
        calibration = _calibration(calibration)
        lengths = _key_lengths(k, phase, cu_seqlens_k, block_table, seq_lens)
        threshold = calibration.scale(phase, target_sparsity) / lengths
        if phase == "decode" and num_splits is None and not two_phase:
            num_splits = calibration.num_splits
    if threshold is None:
        for name, given in (("return_counters", return_counters), ("two_phase", two_phase)):
            if given:
                raise ValueError(f"{name}: has no meaning where threshold is None")
    lambdas = lambda_arguments(threshold, q, cu_seqlens_q)
    graded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if graded and (phase == "decode" or q.is_cuda):
        raise NotImplementedError(
            "threshold_attention has no backward kernel yet: call it under torch.no_grad() or "
            "detach its inputs. In prefill, CPU tensors take the differentiable reference path"
        )
    where = dict(block_table=block_table, seq_lens=seq_lens)
    if phase == "decode":
        options = dict(sink=sink, k_scale=k_scale, v_scale=v_scale, softmax_scale=softmax_scale)
        options |= dict(**where, causal=causal)
        results = _decode(q, k, v, lambdas, skip_block, two_phase, num_splits, validate, options)
    else:
        masks = dict(causal=causal, window=window, softmax_scale=softmax_scale, sink=sink)
        layout = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **where)
        run = _reference_attend if graded else _attend
        results = run(q, k, v, index, lambdas, skip_block, masks | layout, validate)
    out, lse, counters = results
    results = (out,) + ((lse,) if return_lse else ()) + ((counters,) if return_counters else ())
    return results if len(results) > 1 else out


def _check_phase(phase: str, of_prefill: dict, of_decode: dict) -> None:
    others = {"prefill": of_decode, "decode": of_prefill}
    if phase not in others:
        raise ValueError(f"phase: expected 'prefill' or 'decode', got {phase!r}")
    for name, value in others[phase].items():
        if value is not None:
            raise ValueError(f"{name}: has no meaning in phase {phase!r}")


def _capacity(k: Tensor, block_table: Tensor | None) -> int:
    """Keys that a cache has room for, per sequence."""
    return k.shape[2] if block_table is None else block_table.shape[1] * k.shape[1]


def _key_lengths(
    k: Tensor,
    phase: str,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
) -> int | Tensor:
    """Keys of each sequence, at least 1: one number for all, or float32 ``[B, 1]``."""
    if cu_seqlens_k is not None:
        return cu_seqlens_k.diff().clamp(min=1).float().unsqueeze(1)
    if k.dim() != 4:
        raise ValueError(f"k: expected 4 dimensions without cu_seqlens_k, got {list(k.shape)}")
    capacity = max(_capacity(k, block_table), 1)
    return capacity if seq_lens is None else seq_lens.clamp(1, capacity).float().unsqueeze(1)


def _calibration(calibration) -> Calibration:
    from attnsieve.calibration import Calibration  # reads files; few calls need it

    if isinstance(calibration, str | os.PathLike):
        calibration = Calibration.load(calibration)
    if not isinstance(calibration, Calibration):
        raise TypeError(
            f"calibration: expected a path or a Calibration, got {type(calibration).__name__}"
        )
    return calibration


def _attend(q, k, v, index, lambdas, skip_block, options, validate):
    return attend(q, k, v, index, *lambdas, skip_block=skip_block, **options, validate=validate)


def _reference_attend(q, k, v, index, lambdas, skip_block, options, validate):
    """The same with gradients. The op runs first: it checks the arguments."""
    from attnsieve import reference

    value, per_head = lambdas
    if per_head is not None and per_head.requires_grad:
        raise NotImplementedError("threshold: decisions have no gradient; detach it")
    with torch.no_grad():
        _attend(q, k, v, index, lambdas, skip_block, options, validate)
    out, lse, counters = reference.threshold_attention(
        q,
        k,
        v,
        value if per_head is None else per_head,
        index=index,
        skip_block=skip_block,
        **options,
        return_lse=True,
        return_counters=True,
    )
    return out.to(q.dtype), lse.float(), counters


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lambdas: tuple[float | None, Tensor | None],
    skip_block: int,
    two_phase: bool,
    num_splits: int | None,
    validate: bool,
    options: dict,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``options`` are those of :func:`decode`."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions, got shape {list(tensor.shape)}")
    if skip_block not in (64, 128):
        raise ValueError(f"skip_block: expected 64 or 128, got {skip_block}")
    if num_splits is not None and not 1 <= num_splits <= _MAX_SPLITS:
        raise ValueError(f"num_splits: expected 1 to {_MAX_SPLITS} or None, got {num_splits}")
    block_table, seq_lens = options["block_table"], options["seq_lens"]
    if validate:
        check_decode_values(k, None, block_table, seq_lens)
    value, per_head = lambdas
    if value is None and per_head is None:
        return *decode(q, k, v, **options, num_splits=num_splits or 0, return_lse=True), None
    if two_phase:
        return _two_phase(q, k, v, lambdas, skip_block, num_splits or 0, options)
    if num_splits is None:
        num_kv_heads = max(1, k.shape[1 if block_table is None else 2])
        group = max(1, q.shape[1] // num_kv_heads)
        voters = max(1, min(group, _MAX_GROUP // max(1, q.shape[2])))
        num_groups = q.shape[0] * num_kv_heads * -(-group // voters)
        num_splits = threshold_splits(num_groups, _capacity(k, block_table), skip_block)
    return call_op(
        torch.ops.attnsieve.threshold_decode.default,
        q,
        k,
        v,
        block_table,
        seq_lens,
        options["sink"],
        options["k_scale"],
        options["v_scale"],
        value,
        per_head,
        skip_block,
        num_splits,
        default_scale(q, options["softmax_scale"]),
        options["causal"],
    )


def _two_phase(q, k, v, lambdas, skip_block, num_splits, options):
    block_table, seq_lens = options["block_table"], options["seq_lens"]
    num_kv_heads = k.shape[1 if block_table is None else 2]
    for name, cache in (("k_scale", k), ("v_scale", v)):
        check_head_scale(name, options[name], cache, num_kv_heads)
    where = dict(seq_lens=seq_lens, page_size=skip_block)
    logits = proxy_scores(
        q,
        k,
        key_scale=key_scale_of(k, options["k_scale"], heads_last=block_table is not None),
        block_table=block_table,
        **where,
        page_reduce="max",
        causal=options["causal"],
        score_scale=options["softmax_scale"],
    )  # [B, Sq, Hq, tiles]
    value, per_head = lambdas
    if per_head is None:
        log_lambda = min(math.log(value), 0.0) if value > 0 else -math.inf
    else:
        log_lambda = per_head.log().clamp(max=0.0)[:, None, :, None]
    tiles = logits.shape[-1]
    peak = logits.amax(-1, keepdim=True) if tiles > 0 else logits.new_zeros(())
    peak = peak.masked_fill(peak == -math.inf, 0.0)  # sees nothing: every tile below
    keeps = ~(logits - peak < log_lambda)
    kept = keeps.unflatten(2, (num_kv_heads, -1)).any(3).any(1)
    index, _ = select_threshold(kept.float(), 0.5, tiles, **where)
    out, lse = decode(q, k, v, index, **options, num_splits=num_splits, return_lse=True)
    capacity = _capacity(k, block_table) if q.shape[2] > 0 else 0  # no rows see no tiles
    lengths = q.new_full(q.shape[:1], capacity, dtype=torch.int64) if seq_lens is None else seq_lens
    total = -(-lengths.clamp(0, capacity).long() // skip_block).unsqueeze(1)
    counters = torch.stack([total - index.counts, total.expand_as(index.counts)], -1)
    return out, lse, counters.repeat_interleave(q.shape[1] // num_kv_heads, dim=1)
