"""KV caches for transformers' ``generate``.

    from attnsieve.integrations.transformers_cache import AttnsievePagedCache

    cache = AttnsievePagedCache(model.config, max_length=8192)
    model.generate(**inputs, past_key_values=cache)

:class:`AttnsievePagedCache` is read by attnsieve's attention alone: rows are written in place
instead of concatenated, and page bounds are kept for Quest. :class:`LowRankCache` holds everything
in host memory, for ``use(decode=LowRank(offload=True))``.
"""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from attnsieve.cache import CachedKV, PagedKVCache
from attnsieve.offload import host_cache

__all__ = ["AttnsievePagedCache", "LowRankCache", "PagedStates"]


class PagedStates(Tensor):
    """Stands for a layer's cached keys or values ``[B, Hkv, T, D]`` on their way to attention.

    Shape, dtype and device are those of the whole sequence; computing on it raises, because any
    other attention implementation would have to gather the pages.

    Attributes:
        cache: the layer's pages.
        new: the rows of this call, ``[B, Hkv, rows, D]``.
    """

    cache: CachedKV
    new: Tensor

    @staticmethod
    def __new__(cls, cache: CachedKV, new: Tensor, length: int):
        shape = (*new.shape[:2], length, new.shape[3])
        return Tensor._make_wrapper_subclass(cls, shape, dtype=new.dtype, device=new.device)

    def __init__(self, cache: CachedKV, new: Tensor, length: int) -> None:
        self.cache, self.new = cache, new

    def __repr__(self) -> str:
        return f"PagedStates(shape={list(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(
            f"{function} on the pages of an AttnsievePagedCache: only attn_implementation="
            "'attnsieve' reads them"
        )


class _OwnedLayer(CacheLayerMixin):
    """One layer's part of a cache that takes memory for ``max_length`` tokens of a fixed batch."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, owner: Cache) -> None:
        super().__init__()
        self.owner, self.length = owner, 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.owner.max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last ``-tokens_to_remove`` tokens back."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: expected a number of tokens <= 0, got {tokens_to_remove}")
        self.length = max(0, self.length + tokens_to_remove)

    def reset(self) -> None:
        self.length = 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._refuse_another_batch()

    def batch_select_indices(self, indices: Tensor) -> None:
        self._refuse_another_batch()

    def _refuse_another_batch(self) -> NoReturn:
        name = type(self.owner).__name__
        raise NotImplementedError(f"{name}: the batch is fixed; use another cache")


class _PagedLayer(_OwnedLayer):
    """One layer's part of a cache whose pages and lengths all layers share."""

    def __init__(self, owner: AttnsievePagedCache, layer_idx: int) -> None:
        super().__init__(owner)
        self.layer_idx = layer_idx

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.owner.allocate(key_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        pages, self.length = self.owner.pages, self.length + key_states.shape[2]
        if pages.lengths[0] < self.length:  # the first layer of a step makes room for all
            pages.extend(self.length - pages.lengths[0])
        pages.write(key_states, value_states, self.layer_idx)
        cache = pages.layer(self.layer_idx)
        return tuple(PagedStates(cache, x, self.length) for x in (key_states, value_states))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.is_initialized and self.owner.pages.lengths[0] > self.length:
            # The first layer trims for all.
            self.owner.pages.trim(self.owner.pages.lengths[0] - self.length)

    def reset(self) -> None:
        super().reset()
        if self.is_initialized and self.owner.pages.lengths[0] > 0:
            self.owner.pages.free()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("AttnsievePagedCache: beam search needs another cache")


class AttnsievePagedCache(Cache):
    """Keys and values of all layers in a :class:`attnsieve.PagedKVCache`, for unpadded batches.

    Args:
        config: the model's; its number of layers.
        max_length: tokens per sequence, prompt and generated; memory for all is taken at the first
            call.
        page_size: tokens of a page. Prefill in pieces and sliding windows need a multiple of 16.

    Attributes:
        pages: the :class:`attnsieve.PagedKVCache`; None before the first call.

    Sliding-window layers keep all their keys. Beam search, padded batches and attention
    implementations other than attnsieve raise ``NotImplementedError``.
    """

    def __init__(self, config, max_length: int, page_size: int = 16) -> None:
        num_layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[_PagedLayer(self, i) for i in range(num_layers)])
        self.max_length, self.page_size = max_length, page_size
        self.pages: PagedKVCache | None = None

    def allocate(self, key_states: Tensor) -> None:
        """Takes the memory, by the first layer's ``[B, Hkv, rows, D]``; later calls do nothing."""
        if self.pages is not None:
            return
        batch, num_kv_heads, _, head_dim = key_states.shape
        self.pages = PagedKVCache(
            batch * -(-self.max_length // self.page_size),
            num_kv_heads,
            head_dim,
            batch=batch,
            num_layers=len(self.layers),
            page_size=self.page_size,
            max_length=self.max_length,
            dtype=key_states.dtype,
            device=key_states.device,
            bounds=True,
        )
        self.pages.reserve(self.max_length)

    @property
    def batch_size(self) -> int:
        return -1 if self.pages is None else len(self.pages.lengths)


class _HostLayer(_OwnedLayer):
    """One layer's keys and values ``[B, Hkv, max_length, D]``, written in place."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.owner.allocate(key_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, end = self.length, self.length + key_states.shape[2]
        if end > self.owner.max_length:
            raise ValueError(
                f"LowRankCache: max_length is {self.owner.max_length}, {end} tokens came"
            )
        self.keys[:, :, begin:end] = key_states
        self.values[:, :, begin:end] = value_states
        self.length = end
        if begin == 0:  # on the device already
            return key_states, value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            for rows in (self.keys, self.values):
                rows.copy_(rows.index_select(0, beam_idx.to(rows.device)))


class LowRankCache(Cache):
    """Keys and values of all layers in pinned host memory, as tensors of the model's device.

    Any attention implementation reads them, over the host link; the method
    ``LowRank(offload=True)`` of attnsieve reads proxies on the device and fetches only what it
    attends to. A prompt is attended to on the device before it leaves. On a CPU the memory is
    ordinary.

    Args:
        config: the model's; its number of layers.
        max_length: tokens per sequence, prompt and generated. Memory for all layers is taken at
            the first call; where there is none, that call raises and may be made again.

    Sliding-window layers keep all their keys. More tokens than max_length raise ``ValueError``,
    changes of the batch ``NotImplementedError``.
    """

    def __init__(self, config, max_length: int) -> None:
        num_layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[_HostLayer(self) for _ in range(num_layers)])
        self.max_length = max_length

    def allocate(self, key_states: Tensor) -> None:
        """Takes the memory of every layer, by the first one's ``[B, Hkv, rows, D]``, or none."""
        batch, heads, _, head_dim = key_states.shape
        # A token's key and value side by side: what is fetched lies in one page of the host.
        shape = batch, heads, self.max_length, 2, head_dim
        where = dict(dtype=key_states.dtype, device=key_states.device)
        made = [host_cache(shape, **where) for _ in self.layers]
        for layer, both in zip(self.layers, made, strict=True):
            layer.keys, layer.values = both.unbind(3)
            layer.is_initialized = True
