"""KV caches as the ops of the decode family take them: one layer's view, and a paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnsieve._arguments import check_head_scale, key_scale_of
from attnsieve.ops_cache import append_kv

__all__ = ["CachedKV", "PagedKVCache"]


@dataclass(frozen=True)
class CachedKV:
    """One layer's keys and values, contiguous or paged, by the names that the ops give them.

    Attributes:
        k_cache, v_cache: ``[B, Hkv, S, D]``, or with ``block_table`` ``[num_pages, P, Hkv, D]``.
        block_table, seq_lens: as :func:`attnsieve.decode` takes them.
        bounds: minima and maxima of pages, as :func:`attnsieve.append_kv` keeps them, or None.
        k_scale, v_scale: float32 ``[Hkv]`` of a float8_e4m3fn cache, otherwise None.
    """

    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor | None = None
    seq_lens: Tensor | None = None
    bounds: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def where(self) -> dict[str, Tensor | None]:
        """``block_table`` and ``seq_lens`` as keyword arguments."""
        return dict(block_table=self.block_table, seq_lens=self.seq_lens)

    @property
    def scales(self) -> dict[str, Tensor | None]:
        """``k_scale`` and ``v_scale`` as keyword arguments."""
        return dict(k_scale=self.k_scale, v_scale=self.v_scale)

    @property
    def key_scale(self) -> Tensor | None:
        """``k_scale`` as :func:`attnsieve.proxy_scores` takes it for ``k_cache``."""
        return key_scale_of(self.k_cache, self.k_scale, self.block_table is not None)

    @property
    def num_kv_heads(self) -> int:
        return self.k_cache.shape[1 if self.block_table is None else 2]

    def lengths(self, batch: int) -> Tensor:
        """int32 ``[batch]``, keys of each sequence: ``seq_lens``, or all of a contiguous cache."""
        if self.seq_lens is not None:
            return self.seq_lens
        return self.k_cache.new_full((batch,), self.k_cache.shape[2], dtype=torch.int32)


class PagedKVCache:
    """Pages of K and V for a batch of sequences and all layers of a model, allocated once.

    Sequences share one page table and one set of lengths over all layers. A decode step is

        cache.extend(1)                      # room for one more row of every sequence
        for layer in range(num_layers):
            cache.write(k, v, layer)         # k, v [B, Hkv, 1, D], through append_kv
            out = attnsieve.topk_attention(q, cache.k[layer], cache.v[layer],
                                           bounds=cache.bounds[layer], **cache.where)

    Lengths and the free pages are known on the host, so nothing here waits for the device. Where
    :meth:`reserve` has been called for the rows to come, :meth:`extend` by one number is one
    addition on the device. ``block_table`` and ``seq_lens`` keep their memory, so a CUDA graph of
    the layers stays valid: call :meth:`extend` outside of it, before each replay.

    Args:
        num_pages: pages that all sequences share, of ``page_size`` tokens.
        num_kv_heads, head_dim: of every layer.
        batch: rows of the page table; a row without tokens is a free place for a new sequence.
        max_length: tokens that one sequence can grow to; default all pages.
        dtype, device: of K and V; float8_e4m3fn holds codes of ``x / scale``.
        k_scale, v_scale: float32 ``[num_kv_heads]``, or ``[num_layers, num_kv_heads]``: needed with
            float8_e4m3fn, and with no other dtype.
        score_dtype: of ``bounds`` and ``proxy``, the dtype of the queries that are scored over
            them. Default ``dtype``; bfloat16 where that is float8_e4m3fn.
        bounds: keep minima and maxima of each page's keys, for ``score="quest"``.
        projection: ``[num_layers, Hp, D, r]``: keep ``proxy``, each key row times its projection,
            for low-rank selectors; as in :func:`attnsieve.append_kv`.

    Attributes:
        k, v: ``[num_layers, num_pages, page_size, num_kv_heads, head_dim]``, not initialised.
        block_table: int32 ``[batch, max_pages]``, -1 where a sequence has no page.
        seq_lens: int32 ``[batch]``, on the device. ``lengths``: the same as a list of numbers.
        k_scale, v_scale: ``[num_layers, num_kv_heads]`` or None.
        bounds: ``[num_layers, num_pages, num_kv_heads, 2, head_dim]`` or None; of codes where the
            cache holds them.
        proxy: ``[num_layers, num_pages, page_size, Hp, r]`` or None.

    Raises:
        ValueError: a size is not positive, or scales do not fit ``dtype`` and sizes.
    """

    def __init__(
        self,
        num_pages: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        batch: int = 1,
        num_layers: int = 1,
        page_size: int = 16,
        max_length: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        score_dtype: torch.dtype | None = None,
        bounds: bool = False,
        projection: Tensor | None = None,
    ) -> None:
        sizes = dict(num_pages=num_pages, num_kv_heads=num_kv_heads, head_dim=head_dim)
        sizes |= dict(batch=batch, num_layers=num_layers, page_size=page_size)
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.page_size = page_size
        self.max_length = num_pages * page_size if max_length is None else max_length
        max_pages = -(-self.max_length // page_size)
        if score_dtype is None:
            score_dtype = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
        on, side = (dict(dtype=x, device=device) for x in (dtype, score_dtype))
        shape = (num_layers, num_pages, page_size, num_kv_heads, head_dim)
        self.k, self.v = torch.empty(shape, **on), torch.empty(shape, **on)
        self.k_scale = self._scales("k_scale", k_scale)
        self.v_scale = self._scales("v_scale", v_scale)
        self.bounds = self.proxy = None
        if bounds:
            self.bounds = torch.empty(num_layers, num_pages, num_kv_heads, 2, head_dim, **side)
        self.projection = projection
        if projection is not None:
            self.proxy = torch.empty(*shape[:3], projection.shape[1], projection.shape[3], **side)
        self.block_table = torch.full((batch, max_pages), -1, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.lengths = [0] * batch
        self._rows = 0  # of the last extend: per sequence, or with offsets all together
        self._offsets: Tensor | None = None
        self._pages: list[list[int]] = [[] for _ in range(batch)]
        self._free = list(range(num_pages - 1, -1, -1))  # taken from the end

    @property
    def where(self) -> dict[str, Tensor]:
        """``block_table`` and ``seq_lens`` as keyword arguments of the ops."""
        return dict(block_table=self.block_table, seq_lens=self.seq_lens)

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    def layer(self, layer: int = 0) -> CachedKV:
        """What the ops, and the methods of :mod:`attnsieve.methods`, take of one layer."""
        bounds = None if self.bounds is None else self.bounds[layer]
        return CachedKV(
            self.k[layer], self.v[layer], **self.where, bounds=bounds, **self.scales(layer)
        )

    def scales(self, layer: int = 0) -> dict[str, Tensor | None]:
        """``k_scale`` and ``v_scale`` of a layer as keyword arguments of the ops."""
        named = dict(k_scale=self.k_scale, v_scale=self.v_scale)
        return {name: None if x is None else x[layer] for name, x in named.items()}

    def reserve(self, rows: int | Sequence[int]) -> None:
        """Gives every sequence pages for ``rows`` more tokens, a number or one per sequence.

        Raises:
            ValueError: a sequence would outgrow ``max_length``.
            RuntimeError: not enough free pages; nothing has changed then.
        """
        missing = []
        for b, more in enumerate(self._per_sequence(rows)):
            length = self.lengths[b] + more
            if length > self.max_length:
                raise ValueError(
                    f"rows: sequence {b} would have {length} tokens, max_length is "
                    f"{self.max_length}"
                )
            missing.append(max(-(-length // self.page_size) - len(self._pages[b]), 0))
        if sum(missing) > len(self._free):
            raise RuntimeError(
                f"out of pages: {sum(missing)} needed, {len(self._free)} of {self.k.shape[1]} "
                "free; free a sequence or make the cache larger"
            )
        for b, count in enumerate(missing):
            if count == 0:
                continue
            pages = [self._free.pop() for _ in range(count)]
            first = len(self._pages[b])
            self._pages[b] += pages
            places = self.block_table[b, first : first + count]
            places.copy_(torch.tensor(pages, dtype=torch.int32), non_blocking=True)

    def extend(self, rows: int | Sequence[int]) -> None:
        """Lengthens the sequences by the rows that :meth:`write` will then bring, layer by layer.

        Args:
            rows: a number for every sequence, or one per sequence: 0 leaves a sequence as it is,
                and a place without tokens takes a new one. Takes pages where none are reserved.

        Raises:
            ValueError, RuntimeError: as :meth:`reserve`; nothing has changed then.
        """
        self.reserve(rows)
        counts = self._per_sequence(rows)
        if isinstance(rows, int):
            self._rows, self._offsets = rows, None
            self.seq_lens += rows
        else:
            offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
            self._rows, self._offsets = sum(counts), self._on_device(offsets)
            self.seq_lens += self._offsets.diff()
        self.lengths = [length + n for length, n in zip(self.lengths, counts, strict=True)]

    def write(self, k: Tensor, v: Tensor, layer: int = 0) -> None:
        """Writes the rows of the last :meth:`extend` into one layer, with one ``append_kv``.

        Args:
            k, v: ``[batch, num_kv_heads, rows, head_dim]``, or after an ``extend`` by one number
                per sequence packed ``[sum(rows), num_kv_heads, head_dim]``.

        Raises:
            ValueError: shape, dtype or device do not fit.
        """
        packed = self._offsets is not None
        if k.dim() != (3 if packed else 4) or k.shape[0 if packed else 2] != self._rows:
            shape = f"[{self._rows}, Hkv, D]" if packed else f"[batch, Hkv, {self._rows}, D]"
            raise ValueError(f"k: expected {shape} after this extend, got {list(k.shape)}")
        append_kv(
            k,
            v,
            self.k[layer],
            self.v[layer],
            **self.where,
            **self.scales(layer),
            cu_seqlens=self._offsets,
            bounds=None if self.bounds is None else self.bounds[layer],
            projection=None if self.projection is None else self.projection[layer],
            proxy=None if self.proxy is None else self.proxy[layer],
        )

    def append(self, k: Tensor, v: Tensor) -> None:
        """:meth:`extend` and :meth:`write` for a cache of one layer: k, v ``[B, Hkv, rows, D]``."""
        if self.k.shape[0] != 1:
            raise ValueError(
                f"append: this cache has {self.k.shape[0]} layers; call extend once, then write "
                "for each layer"
            )
        if k.dim() != 4:
            raise ValueError(f"k: expected [batch, Hkv, rows, D], got {list(k.shape)}")
        self.extend(k.shape[2])
        self.write(k, v)

    def trim(self, rows: int | Sequence[int]) -> None:
        """Takes the last ``rows`` tokens back (a rejected draft); pages stay reserved.

        The bounds of a page that keeps some of its keys stay bounds, and are exact again once the
        page receives a row.
        """
        counts = self._per_sequence(rows)
        for b, (length, n) in enumerate(zip(self.lengths, counts, strict=True)):
            if n > length:
                raise ValueError(f"rows: sequence {b} has {length} tokens, cannot trim {n}")
        if isinstance(rows, int):
            self.seq_lens -= rows
        else:
            self.seq_lens -= self._on_device(torch.tensor(counts, dtype=torch.int32))
        self.lengths = [length - n for length, n in zip(self.lengths, counts, strict=True)]

    def free(self, sequence: int | None = None) -> None:
        """Empties one place of the batch, or all, and gives their pages back."""
        places = range(len(self.lengths))
        for b in places if sequence is None else [places[sequence]]:
            self._free += reversed(self._pages[b])
            self._pages[b] = []
            self.lengths[b] = 0
            self.block_table[b] = -1
            self.seq_lens[b] = 0

    def _scales(self, name: str, scale: Tensor | None) -> Tensor | None:
        """``[num_layers, Hkv]`` on the device of the pages."""
        num_layers, num_kv_heads = self.k.shape[0], self.k.shape[3]
        of_layer = scale
        if isinstance(scale, Tensor) and scale.dim() == 2 and scale.shape[0] == num_layers:
            of_layer = scale[0]
        check_head_scale(name, of_layer, self.k, num_kv_heads)
        if scale is None:
            return None
        return scale.to(self.k.device).expand(num_layers, num_kv_heads).contiguous()

    def _on_device(self, numbers: Tensor) -> Tensor:
        return numbers.to(self.seq_lens.device, non_blocking=True)

    def _per_sequence(self, rows: int | Sequence[int]) -> list[int]:
        counts = [rows] * len(self.lengths) if isinstance(rows, int) else list(rows)
        if len(counts) != len(self.lengths) or min(counts) < 0:
            raise ValueError(
                f"rows: expected a number >= 0, or one for each of {len(self.lengths)} sequences, "
                f"got {rows}"
            )
        return counts
