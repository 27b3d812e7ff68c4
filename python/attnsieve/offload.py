"""A KV cache in host memory, of which a GPU holds the tokens that its last steps attended to.

``B`` batch, ``Hkv`` KV heads, ``S`` tokens, ``D`` head dim, ``W`` slots of a working set.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnsieve._arguments import call_op
from attnsieve.token_index import TokenIndex

__all__ = ["WorkingSet", "host_cache"]


class _Mapped:
    """Pinned memory under the protocol by which torch takes foreign device memory."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory  # lives as long as the tensor made of it
        self.__cuda_array_interface__ = dict(
            shape=tuple(memory.shape), typestr="|u1", data=(memory.data_ptr(), False), version=3
        )


def host_cache(
    shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str = "cuda"
) -> Tensor:
    """Zeros in pinned host memory, as a tensor of ``device``.

    Kernels read and write it over the host link, 16 bytes or more at a time; every op of this
    library takes it as it takes device memory. It is freed with the tensor; torch keeps pinned
    memory for later requests, in powers of two. On the CPU an ordinary tensor.

    Raises:
        RuntimeError: there is not as much memory, or it cannot be pinned; nothing is kept of it.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = torch.Size(shape).numel() * dtype.itemsize
    if size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
    return torch.as_tensor(_Mapped(memory), device=device).view(dtype).view(shape)


class WorkingSet:
    """Slots on the device for tokens of a cache that lies in host memory.

    A step names the tokens that it wants, a list for each sequence and KV head. Those that are in a
    slot stay there; the rows of the others are copied from the cache into slots of tokens that are
    not wanted. Which slot a token takes does not change an attention over them:
    :func:`attnsieve.decode` over ``k``, ``v`` and what :meth:`fetch` returns has the bits of one
    over the cache and the list itself.

    Args:
        num_slots: W, at least the room of a list. More keep tokens for later steps.

    Attributes:
        k, v: ``[B, Hkv, W, D]``.
        slots: int32 ``[B, Hkv, W]``, the token in each slot, -1 for none.
        moved: int64 ``[2]`` on the device: tokens wanted and tokens copied, since :meth:`reset`.
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        num_slots: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (batch, num_kv_heads, num_slots)
        self.k, self.v = (
            torch.zeros((*shape, head_dim), dtype=dtype, device=device) for _ in range(2)
        )
        self.slots = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.moved = torch.zeros(2, dtype=torch.int64, device=device)

    def fetch(
        self,
        index: TokenIndex,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        first_new: Tensor | None = None,
    ) -> TokenIndex:
        """Brings the tokens of ``index`` into slots: two launches, nothing synchronises.

        Args:
            index: tokens, a list per sequence and KV head, as :func:`attnsieve.select_topk` makes
                it: strictly increasing, padding behind the counts.
            k_cache, v_cache: ``[B, Hkv, S, D]`` in the dtype of the slots, such as
                :func:`host_cache` makes.
            first_new: int32 ``[B]``: this token and later ones were written since the last call and
                are copied again. None: no token that is in a slot has changed.

        Returns:
            The slots of these tokens in the same order; entries outside the cache become -1.

        Raises:
            ValueError: shapes that do not fit, or an index of pages, of slots or with a list per
                row.
        """
        if index.per_row or index.page_size != 1 or index.physical:
            raise ValueError("index: expected tokens, one list per sequence and KV head")
        counts = index.counts
        if counts is None:
            counts = index.indices.new_full(index.indices.shape[:2], index.indices.shape[2])
        positions = call_op(
            torch.ops.attnsieve.fetch_tokens.default,
            index.indices.contiguous(),
            counts.contiguous(),
            k_cache,
            v_cache,
            self.slots,
            self.k,
            self.v,
            first_new,
            self.moved,
        )
        return TokenIndex(positions, counts)

    def reset(self) -> None:
        """Forgets what is in the slots, and the counts."""
        self.slots.fill_(-1)
        self.moved.zero_()

    @property
    def hit_rate(self) -> float:
        """Share of wanted tokens that were in a slot; 1 before any was wanted. Synchronises."""
        wanted, copied = self.moved.tolist()
        return 1.0 - copied / wanted if wanted else 1.0

    @property
    def bytes_moved(self) -> int:
        """Of keys and values, from the cache into slots. Synchronises."""
        return 2 * self.moved.tolist()[1] * self.k.shape[3] * self.k.element_size()
