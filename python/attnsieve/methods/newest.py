"""The newest rows of a cache, by indices that the layers of a step share."""

from __future__ import annotations

from collections.abc import Hashable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnsieve.cache import CachedKV


@dataclass(frozen=True)
class Tail:
    """The last rows of a contiguous cache whose sequences fill it.

    Attributes:
        begin, end: positions.
    """

    begin: int
    end: int

    def keys(self, cache: CachedKV, dtype: torch.dtype) -> Tensor:
        """``[B, Hkv, rows, D]``."""
        return _scaled(cache.k_cache[:, :, self.begin : self.end].to(dtype), cache)

    def put(self, held: Tensor, numbers: Tensor) -> None:
        """Writes ``[B, H, rows, r]`` into what is held of every position, ``[B, H, S, r]``."""
        held[:, :, self.begin : self.end] = numbers


@dataclass(eq=False)
class Rows:
    """The newest rows of sequences with lengths of their own, or in pages.

    Attributes:
        positions: int64 ``[B, 1, rows]``.
        at: of a cache in pages, ``[B, rows]`` pages and rows in them, and ``[B, rows, 1, 1]`` where
            there is no page; else None.
        found_from: lengths and pages. when: what else must be equal to use these again.
        layer: the last one that used them.
    """

    positions: Tensor
    at: tuple[Tensor, Tensor, Tensor] | None
    found_from: tuple[Tensor, Tensor | None]
    when: tuple
    layer: int

    @property
    def begin(self) -> Tensor:
        """int64 ``[B, 1, 1]``."""
        return self.positions[..., :1]

    def keys(self, cache: CachedKV, dtype: torch.dtype) -> Tensor:
        """``[B, Hkv, rows, D]``, zeros where there is no page."""
        if self.at is None:
            return keys_at(cache, self.positions, dtype)
        pages, offsets, missing = self.at
        keys = cache.k_cache[pages, offsets].to(dtype).masked_fill_(missing, 0)
        return _scaled(keys.transpose(1, 2), cache)

    def put(self, held: Tensor, numbers: Tensor) -> None:
        """As :meth:`Tail.put`."""
        held.scatter_(2, self.positions[..., None].expand_as(numbers), numbers)

    def serves(self, cache: CachedKV, when: tuple, layer: int) -> bool:
        """Whether they were found in this step, by a lower layer."""
        lengths, table = self.found_from
        same = lengths is cache.seq_lens and table is cache.block_table
        return same and self.when == when and self.layer < layer


def newest_rows(
    state: MutableMapping[Hashable, Any], place: tuple, cache: CachedKV, batch: int, rows: int
) -> Tail | Rows:
    """Where the last ``rows`` tokens of each of ``batch`` sequences are.

    Args:
        state, place: where they are held for the layers of a step, which ask in ascending order;
            ``place`` ends with the layer.
    """
    capacity = capacity_of(cache)
    if cache.block_table is None and cache.seq_lens is None:
        return Tail(max(capacity - rows, 0), capacity)
    *key, layer = place
    key, lengths = ("newest", *key), cache.seq_lens
    # What a graph under capture has not computed itself must not be read in its replays.
    capturing = lengths.is_cuda and torch.cuda.is_current_stream_capturing()
    changes = None if lengths.is_inference() else lengths._version
    when = batch, rows, capacity, capturing, changes
    held = state.get(key)
    if held is not None and held.serves(cache, when, layer):
        held.layer = layer
        return held
    last = torch.arange(-rows, 0, device=lengths.device)
    positions = (lengths.view(-1, 1, 1) + last).clamp_(0, capacity - 1)
    at = None
    if cache.block_table is not None:
        pages, offsets, exists = in_pages(cache, positions[:, 0])
        at = pages, offsets, ~exists[..., None, None]
    held = state[key] = Rows(positions, at, (lengths, cache.block_table), when, layer)
    return held


def capacity_of(cache: CachedKV) -> int:
    """Tokens of a sequence that the cache can hold."""
    if cache.block_table is None:
        return cache.k_cache.shape[2]
    return cache.block_table.shape[1] * cache.k_cache.shape[1]


def keys_at(cache: CachedKV, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, Hkv, n, D]`` of the tokens ``[B, 1 or Hkv, n]``, zeros where there is no page."""
    keys, heads = cache.k_cache, cache.num_kv_heads
    if cache.block_table is None:
        places = positions[..., None].expand(-1, heads, -1, keys.shape[3])
        return _scaled(keys.gather(2, places).to(dtype), cache)
    pages, offsets, exists = in_pages(cache, positions.flatten(1))
    every_head = torch.arange(heads, device=keys.device)[:, None]
    keys = keys[pages.view_as(positions), offsets.view_as(positions), every_head].to(dtype)
    return _scaled(keys.where(exists.view_as(positions)[..., None], 0), cache)


def in_pages(cache: CachedKV, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Page, row in it, and whether there is such a page, of the tokens ``[B, n]``."""
    page_size = cache.k_cache.shape[1]
    pages = cache.block_table.long().gather(1, positions // page_size)
    exists = (pages >= 0) & (pages < cache.k_cache.shape[0])
    return pages.where(exists, 0), positions % page_size, exists


def _scaled(keys: Tensor, cache: CachedKV) -> Tensor:
    """Keys of codes as what these stand for."""
    if cache.k_scale is None:
        return keys
    return keys * cache.k_scale.to(keys.dtype)[:, None, None]
