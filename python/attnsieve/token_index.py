"""TokenIndex: which tokens or pages of the KV cache each decoded row attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import Tensor

__all__ = ["TokenIndex"]


@dataclass(frozen=True, eq=False)
class TokenIndex:
    """Lists of key positions, one per (batch, list head), or one per new query row as well.

    Attributes:
        indices: int32 ``[B, Hidx, k]``, the same list for every new row, or ``[B, Sq, Hidx, k]``.
            -1 is padding wherever it stands.
        counts: int32 ``indices.shape[:-1]``; how many slots of the list are read. None: all k.
        page_size: 1: an entry is a key position. u > 1: entry e stands for the keys
            ``[e * u, (e + 1) * u)``; u need not be the page size of the cache.
        physical: entries are slots ``page * page_size + row`` of a paged cache (page ids, where
            ``page_size`` > 1), not positions: neither lengths nor the causal mask trims them.

    ``Hidx`` is Hq, Hkv or 1: query head ``h`` reads list ``h // (Hq // Hidx)``. Positions beyond
    the sequence or the row's causal limit are skipped, as are negative ones.

    Canonical lists are strictly increasing with padding only behind ``counts``. Others are
    memory-safe: bad entries are skipped, ``counts`` are clamped to ``[0, k]``, an entry listed
    twice is attended twice.

    An index is two plain tensors: it may be passed again to another layer or step. The class is a
    pytree node, so it passes through ``torch.compile`` and ``torch.export``.

    Raises:
        TypeError: a tensor is not int32, or ``page_size`` not an int.
        ValueError: shapes or devices do not match, or ``page_size`` is not positive.
    """

    indices: Tensor
    counts: Tensor | None = None
    page_size: int = 1
    physical: bool = False

    def __post_init__(self) -> None:
        for name, tensor in (("indices", self.indices), ("counts", self.counts)):
            if name == "counts" and tensor is None:
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
            if tensor.dtype != torch.int32:
                raise TypeError(f"{name} must be int32, got {tensor.dtype}")
        if self.indices.dim() not in (3, 4):
            raise ValueError(
                "indices must be [B, Hidx, k] or [B, Sq, Hidx, k], got shape "
                f"{list(self.indices.shape)}"
            )
        if self.counts is not None:
            if self.counts.shape != self.indices.shape[:-1]:
                raise ValueError(
                    f"counts must be indices.shape[:-1] = {list(self.indices.shape[:-1])}, "
                    f"got shape {list(self.counts.shape)}"
                )
            if self.counts.device != self.indices.device:
                raise ValueError(
                    f"counts is on {self.counts.device}, indices on {self.indices.device}"
                )
        if isinstance(self.page_size, bool) or not isinstance(self.page_size, int):
            raise TypeError(f"page_size must be an int, got {type(self.page_size).__name__}")
        if self.page_size <= 0:
            raise ValueError(f"page_size must be positive, got {self.page_size}")

    @property
    def per_row(self) -> bool:
        """Whether every new query row has its own lists."""
        return self.indices.dim() == 4

    @property
    def num_lists(self) -> int:
        """Hidx."""
        return self.indices.shape[-2]

    @property
    def capacity(self) -> int:
        """k, the slots of a list."""
        return self.indices.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.indices.device

    def validate(self, limits: int | Tensor) -> None:
        """Checks ranges and order: one device reduction and one host sync.

        Args:
            limits: entries must lie in ``[0, limits)`` or be -1; a number or int ``[B]``.

        Raises:
            ValueError: names the first bad list (a count outside ``[0, k]``) or slot (an entry out
                of range, or a position not above those before it), and the value found there.
        """
        shape, device = self.indices.shape, self.device
        if self.counts is not None:
            bad = torch.nonzero((self.counts < 0) | (self.counts > self.capacity))
            if len(bad):
                where = bad[0].tolist()
                value = int(self.counts[tuple(where)])
                raise ValueError(f"counts{where} = {value} is outside [0, {self.capacity}]")
        used = torch.ones(shape, dtype=torch.bool, device=device)
        if self.counts is not None:
            used = torch.arange(self.capacity, device=device) < self.counts.unsqueeze(-1)
        limits = torch.as_tensor(limits, device=device).reshape(-1, *(1,) * (len(shape) - 1))
        bad = used & ((self.indices < -1) | (self.indices >= limits))
        if not self.physical and self.capacity > 0:
            listed = self.indices.masked_fill(~used, -1)
            before = listed.cummax(-1).values[..., :-1]
            bad[..., 1:] |= used[..., 1:] & (listed[..., 1:] >= 0) & (listed[..., 1:] <= before)
        first = torch.nonzero(bad)[:1]
        if len(first):
            where = first[0].tolist()
            value = int(self.indices[tuple(where)])
            limit = int(limits.flatten()[where[0] if limits.numel() > 1 else 0])
            raise ValueError(
                f"indices{where} = {value}: expected -1 or an entry of [0, {limit}) above those "
                "before it"
            )


def _flatten(index: TokenIndex):
    return [index.indices, index.counts], (index.page_size, index.physical)


def _flatten_with_keys(index: TokenIndex):
    leaves, context = _flatten(index)
    names = ("indices", "counts")
    return [(pytree.GetAttrKey(n), x) for n, x in zip(names, leaves, strict=True)], context


def _unflatten(tensors, context) -> TokenIndex:
    # Tree utilities rebuild nodes around placeholders that are no tensors: no checks here.
    index = object.__new__(TokenIndex)
    fields = ("indices", "counts", "page_size", "physical")
    for name, value in zip(fields, (*tensors, *context), strict=True):
        object.__setattr__(index, name, value)
    return index


pytree.register_pytree_node(
    TokenIndex,
    _flatten,
    _unflatten,
    serialized_type_name="attnsieve.TokenIndex",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=_flatten_with_keys,
)
