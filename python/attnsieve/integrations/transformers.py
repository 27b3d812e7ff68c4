"""attnsieve as an attention implementation of Hugging Face transformers (5.x).

    from attnsieve.integrations.transformers import register, use
    from attnsieve.methods import PooledTopP, Quest

    register()
    model.set_attn_implementation("attnsieve")         # dense attention through attnsieve
    with use(PooledTopP(0.95), decode=Quest(k=2048)):  # sparse prefill, sparse decode steps
        model.generate(**inputs)

Two functions are registered, because transformers drops padding silently for an implementation
that has only the first: :func:`attention` computes one layer, :func:`attention_mask` says which
keys exist. Padded batches are computed sequence by sequence, without the padding.

A decode step is a call of 1 to 8 new rows after cached keys, in a layer without sliding window; the
others, and all where no decode method is chosen, are dense below a method's ``min_seqlen_q``. Keys
come from any cache of transformers, or from the pages of
:class:`attnsieve.integrations.transformers_cache.AttnsievePagedCache`.

Anything that would change the result and is not implemented raises ``NotImplementedError`` with the
feature's name: gradients, dropout, logit soft-capping, position biases, attention weights as an
output, packed sequences, custom masks, chunked and bidirectional-window attention, the paged caches
of continuous batching.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from attnsieve.cache import CachedKV
from attnsieve.integrations.transformers_cache import PagedStates
from attnsieve.methods import MAX_DECODE_ROWS, DecodeMethod, Dense, DenseDecode, Method
from attnsieve.ops import block_sparse_attention

__all__ = ["attention", "attention_mask", "current_method", "register", "set_method", "use"]


@dataclass(frozen=True)
class _Choice:
    """What :func:`set_method` was given; None is dense."""

    prefill: Method | None = None
    decode: DecodeMethod | None = None


_DENSE, _DENSE_DECODE = Dense(), DenseDecode()
_choice = _Choice()
_choice_of_module: WeakKeyDictionary[nn.Module, _Choice] = WeakKeyDictionary()


def register(name: str = "attnsieve") -> None:
    """Makes ``attn_implementation=name`` known to transformers. Safe to call again.

    Raises:
        ValueError: transformers already has another implementation of this name.
        ImportError: transformers is too old to describe masks by lengths and offsets.
    """
    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError("attnsieve needs a transformers 5 whose masks take q_offset")
    for interface, function in (
        (AttentionInterface, attention),
        (AttentionMaskInterface, attention_mask),
    ):
        registered = interface()
        if name in registered and registered[name] is not function:
            raise ValueError(f"transformers already has an attention implementation {name!r}")
        interface.register(name, function)


def set_method(
    method: Method | None = None,
    model: nn.Module | None = None,
    *,
    decode: DecodeMethod | None = None,
) -> None:
    """Chooses how attention is computed from now on; None is dense.

    Without ``model`` the choice is the process's, for every model that has none of its own, in all
    threads. With ``model`` it holds for this model (or part of one: any module).

    Args:
        method: prefill. decode: decode steps. A decode method remembers what it reuses, so it
            serves one model at a time; a prefill resets it. Beam search moves sequences to other
            places of the batch, where the lists and bounds of their former ones would serve them.
    """
    if method is not None and not isinstance(method, Method):
        raise TypeError(f"method must be an attnsieve.methods.Method, got {method!r}")
    if decode is not None and not isinstance(decode, DecodeMethod):
        raise TypeError(f"decode must be an attnsieve.methods.DecodeMethod, got {decode!r}")
    choice = _Choice(method, decode)
    if model is None:
        global _choice
        _choice = choice
    else:
        for module in model.modules():
            _choice_of_module[module] = choice


@contextmanager
def use(
    method: Method | None = None,
    model: nn.Module | None = None,
    *,
    decode: DecodeMethod | None = None,
) -> Iterator[None]:
    """:func:`set_method` for the length of a ``with`` block; what held before comes back."""
    modules = [] if model is None else list(model.modules())
    before = {m: _choice_of_module[m] for m in modules if m in _choice_of_module}
    before_all = _choice
    set_method(method, model, decode=decode)
    try:
        yield
    finally:
        if model is None:
            set_method(before_all.prefill, decode=before_all.decode)
        for module in modules:
            _choice_of_module.pop(module, None)
        _choice_of_module.update(before)


def current_method(module: nn.Module) -> Method:
    """The method that ``module`` runs in prefill: its model's, else the process's, else dense."""
    return _choice_of_module.get(module, _choice).prefill or _DENSE


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor | None:
    """The mask that transformers hands to every layer: which keys exist, by absolute position.

    Arguments are those of transformers' ``AttentionMaskInterface``. Causality and windows are not
    part of the result (layers state them); ``mask_function`` is checked to be nothing else.

    Returns:
        None when every key that a layer receives exists; else bool ``[B, keys]``, one column for
        each position from 0 to the last query. Caches that hold more positions (static) or fewer
        (sliding) than that are lined up by :func:`attention`. Passing the result in again as a
        model's ``attention_mask`` (as generation with static caches does) changes nothing.

    Raises:
        NotImplementedError: the mask is neither causal, causal with a sliding window, nor
            bidirectional.
    """
    end = kv_offset + kv_length
    if mask_function is not bidirectional_mask_function:
        seen = int(q_offset) + q_length
        end = min(end, seen)
        window = None if mask_function is causal_mask_function else local_size
        plain = mask_function is causal_mask_function or (
            window is not None
            and not use_vmap
            and _is_causal_window(
                mask_function, window, batch_size, q_length, end, seen - q_length, kv_offset, device
            )
        )
        if not plain:
            _refuse(
                "masks other than causal, causal with a sliding window, or bidirectional (packed "
                "sequences, chunked attention, prefixes that see themselves)"
            )
    if attention_mask is None:
        if end == kv_offset + kv_length:
            return None
        return torch.ones(batch_size, end, dtype=torch.bool, device=device)
    keys = attention_mask[:, :end]
    keys = torch.nn.functional.pad(keys, (0, end - keys.shape[1])).to(torch.bool)
    if end == kv_offset + kv_length and bool(keys[:, kv_offset:].all()):
        return None
    return keys


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """One layer's attention, in the form transformers calls: ``AttentionInterface``.

    Args:
        query: ``[B, Hq, Sq, D]``; key, value: ``[B, Hkv, Sk, D]``, cached keys included, or what
            stands for them in an ``AttnsievePagedCache``.
        attention_mask: what :func:`attention_mask` returned.
        sliding_window: a query sees itself and the ``sliding_window - 1`` keys before it.
        s_aux: attention sink logits, ``[Hq]``.

    Returns:
        ``(out [B, Sq, Hq, D] contiguous, None)``. Rows of padding tokens are 0 in causal models.

    Raises:
        NotImplementedError: a feature in the call is not supported; the message names it.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        _refuse("gradients (run the model under torch.no_grad() or torch.inference_mode())")
    if dropout:
        _refuse("attention dropout (call model.eval())")
    if softcap:
        _refuse("logit soft-capping")
    if position_bias is not None:
        _refuse("position biases")
    if kwargs.get("output_attentions"):
        _refuse("attention weights as an output (output_attentions=True)")
    if kwargs.get("cache") is not None:
        _refuse("paged caches (continuous batching)")
    if kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seq_lens_k") is not None:
        _refuse("packed sequences")
    if sliding_window is not None and not causal:
        _refuse("sliding windows in bidirectional attention")
    if value.shape[-1] != query.shape[-1]:
        _refuse(f"values of another head_dim ({value.shape[-1]}) than queries ({query.shape[-1]})")
    if attention_mask is not None and (
        not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2
    ):
        _refuse("custom masks (give the model a 2-D padding mask)")

    settings = dict(
        causal=bool(causal),
        window=(sliding_window - 1, 0) if sliding_window is not None else None,
        softmax_scale=scaling,
        sink=s_aux.float() if s_aux is not None else None,
        layer_idx=getattr(module, "layer_idx", None),
    )
    choice = _choice_of_module.get(module, _choice)
    if attention_mask is None:
        out = _attend(choice, query, key, value, settings)
        return out.transpose(1, 2).contiguous(), None
    if isinstance(key, PagedStates):
        _refuse("padded batches in an AttnsievePagedCache")
    out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    holes_allowed = sliding_window is None or sliding_window >= key.shape[2]
    for row in _rows(attention_mask, query.shape[2], key.shape[2], bool(causal), holes_allowed):
        part = _attend(
            choice,
            query[row.batch, :, row.queries],
            key[row.batch, :, row.keys],
            value[row.batch, :, row.keys],
            settings,
            row.batch.start,
        )
        out[row.batch, row.queries] = part.transpose(1, 2)
    return out, None


def _attend(
    choice: _Choice, q: Tensor, k: Tensor, v: Tensor, settings: dict, sequence: int = 0
) -> Tensor:
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    step = seqlen_q <= MAX_DECODE_ROWS and seqlen_q < seqlen_k
    paged = isinstance(k, PagedStates)
    if choice.decode is not None and not step:
        new = k.new if paged else k[:, :, seqlen_k - seqlen_q :]
        place = dict(layer_idx=settings["layer_idx"] or 0, sequence=sequence)
        choice.decode.prefill(q, new, begin=seqlen_k - seqlen_q, **place)
    method = choice.prefill or _DENSE
    if seqlen_q < getattr(method, "min_seqlen_q", 0):
        method = _DENSE
    decode = choice.decode or (_DENSE_DECODE if paged and isinstance(method, Dense) else None)
    if step and decode is not None and settings["causal"] and settings["window"] is None:
        named = {name: settings[name] for name in ("layer_idx", "softmax_scale", "sink")}
        if named["layer_idx"] is None:
            _refuse("decode methods in a module without layer_idx")
        return decode(q, k.cache if paged else CachedKV(k, v), sequence=sequence, **named)
    if not paged:
        return method(q, k, v, **settings)
    if seqlen_q == seqlen_k:
        return method(q, k.new, v.new, **settings)
    if not isinstance(method, Dense):
        _refuse("sparse prefill after keys in an AttnsievePagedCache")
    masks = {name: x for name, x in settings.items() if name != "layer_idx"}
    return block_sparse_attention(q, k.cache.k_cache, k.cache.v_cache, **k.cache.where, **masks)


@dataclass(frozen=True)
class _Row:
    """The queries and keys of sequences of a batch: contiguous slices, or lists of positions."""

    batch: slice
    queries: slice | Tensor
    keys: slice | Tensor


def _rows(
    mask: Tensor, seqlen_q: int, seqlen_k: int, causal: bool, holes_allowed: bool
) -> list[_Row]:
    """What is left of each sequence without its padding; reads the mask on the host once a forward.

    Sequences of which the same is left are one entry.

    The columns of ``mask`` are positions up to the last query. A longer key tensor is a static
    cache (its tail is unused), a shorter one a sliding cache (it holds the last positions). Keys
    that are missing in the middle (right-padded prompts, once tokens follow) are taken out as well:
    dropping a key that no query sees keeps bottom-right causality, but would stretch a window.
    """
    cached = getattr(mask, "_attnsieve_rows", None)
    if cached is not None and cached[0] == (seqlen_q, seqlen_k, causal, holes_allowed):
        return cached[1]
    keys = mask[:, -seqlen_k:].bool()
    host = keys.cpu()
    rows = []
    for batch in range(host.shape[0]):
        queries, used = slice(0, seqlen_q), _positions(host[batch])
        if causal:
            if host.shape[1] < seqlen_q:
                _refuse("causal attention over fewer keys than queries")
            queries = _positions(host[batch, host.shape[1] - seqlen_q :])
        if isinstance(used, Tensor) and not holes_allowed:
            _refuse("padding in the middle of a sequence together with a sliding window")
        if any(isinstance(p, slice) and p.start == p.stop for p in (queries, used)):
            continue
        on_device = [p.to(mask.device) if isinstance(p, Tensor) else p for p in (queries, used)]
        rows.append(_Row(slice(batch, batch + 1), *on_device))
    if len(rows) == len(host) and all(_alike(rows[0], row) for row in rows):
        rows = [_Row(slice(0, len(host)), rows[0].queries, rows[0].keys)]
    # Layers of one forward share the mask tensor, so the host sync happens in the first one only.
    mask._attnsieve_rows = ((seqlen_q, seqlen_k, causal, holes_allowed), rows)
    return rows


def _alike(a: _Row, b: _Row) -> bool:
    slices = isinstance(a.queries, slice) and isinstance(a.keys, slice)
    return slices and (a.queries, a.keys) == (b.queries, b.keys)


def _positions(present: Tensor) -> slice | Tensor:
    """Where a bool vector is true: a slice when contiguous, else int64 positions."""
    where = present.nonzero().flatten()
    if where.numel() == 0:
        return slice(0, 0)
    first, last = int(where[0]), int(where[-1])
    return slice(first, last + 1) if last - first + 1 == where.numel() else where


# Pairs compared at once by _is_causal_window: bounds its memory to some tens of megabytes.
_PAIRS_PER_CHECK = 1 << 24


def _is_causal_window(
    mask_function, window, batch_size, q_length, end, q_offset, kv_offset, device
) -> bool:
    """Whether ``mask_function`` shows every query itself and the ``window - 1`` keys before it."""
    keys = torch.arange(kv_offset, end, device=device)
    head = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    batch = torch.arange(batch_size, device=device)[:, None, None, None]
    step = max(1, _PAIRS_PER_CHECK // max(1, batch_size * keys.numel()))
    for rows in torch.arange(q_offset, q_offset + q_length, device=device).split(step):
        rows = rows[None, None, :, None]
        expected = (keys <= rows) & (keys > rows - window)
        if bool((mask_function(batch, head, rows, keys[None, None, None]) != expected).any()):
            return False
    return True


def _refuse(feature: str) -> NoReturn:
    raise NotImplementedError(f"attnsieve attention does not support {feature}")
