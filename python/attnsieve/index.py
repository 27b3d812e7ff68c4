"""BlockIndex: which KV blocks each block of query rows attends to, and its foreign formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.utils._pytree as pytree
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["BlockIndex"]


@dataclass(frozen=True, eq=False)
class BlockIndex:
    """Lists of KV blocks, one list per (batch, list head, block of query rows).

    Attributes:
        counts: int32 ``[B, Hidx, nQ]``; how many entries of the row are read.
        columns: int32 ``[B, Hidx, nQ, capacity]``; KV block ids. Entries past ``counts`` are never
            read; the constructors of this class fill them with -1.
        block_q: query rows per row of the index. ``nQ = ceil(seqlen_q / block_q)``. Attention
            takes 64 and 128.
        block_k: keys per block id. ``nK = ceil(seqlen_k / block_k)``, over paged K and V
            ``ceil(max_pages * page_size / block_k)``. The last block may be ragged. Attention
            takes 16, 32, 64 and 128.

    ``Hidx`` is Hq, Hkv or 1: query head ``h`` reads list ``h // (Hq // Hidx)``. Rows are
    intersected with the causal or window mask of the call that uses the index.

    Canonical rows are strictly increasing. Others are memory-safe: ids outside ``[0, nK)`` are
    skipped, ``counts`` are clamped to ``[0, capacity]``, a block listed twice is attended twice.

    The class is a pytree node, so it passes through ``torch.compile`` and ``torch.export``.

    Raises:
        TypeError: ``counts`` or ``columns`` is not an int32 tensor, or a block size is not an int.
        ValueError: the shapes or devices do not match, or a block size is not positive.
    """

    counts: Tensor
    columns: Tensor
    block_q: int
    block_k: int

    def __post_init__(self) -> None:
        for name, rank in (("counts", 3), ("columns", 4)):
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
            if tensor.dtype != torch.int32:
                raise TypeError(f"{name} must be int32, got {tensor.dtype}")
            if tensor.dim() != rank:
                raise ValueError(f"{name} must have {rank} dimensions, got shape {_shape(tensor)}")
        if self.counts.shape != self.columns.shape[:3]:
            raise ValueError(
                f"columns must be [*counts.shape, capacity]; counts is {_shape(self.counts)}, "
                f"columns is {_shape(self.columns)}"
            )
        if self.counts.device != self.columns.device:
            raise ValueError(f"columns is on {self.columns.device}, counts on {self.counts.device}")
        for name in ("block_q", "block_k"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name} must be an int, got {type(size).__name__}")
            if size <= 0:
                raise ValueError(f"{name} must be positive, got {size}")

    @property
    def num_rows(self) -> int:
        """nQ, the rows of each list."""
        return self.counts.shape[2]

    @property
    def capacity(self) -> int:
        """Entries that a row has room for."""
        return self.columns.shape[3]

    @property
    def device(self) -> torch.device:
        return self.counts.device

    def to(self, device: torch.device | str) -> BlockIndex:
        """The same index on ``device``."""
        return BlockIndex(
            self.counts.to(device), self.columns.to(device), self.block_q, self.block_k
        )

    def validate(self, num_k_blocks: int) -> None:
        """Checks that the index is canonical: one device reduction and one host sync.

        Args:
            num_k_blocks: nK; ids must lie in ``[0, nK)``.

        Raises:
            ValueError: names the first bad ``[b, h, row]`` (a count outside ``[0, capacity]``) or
                ``[b, h, row, slot]`` (an id out of range or not above the one before it), and the
                value found there.
        """
        if self.counts.numel() == 0:
            return
        bad_count = (self.counts < 0) | (self.counts > self.capacity)
        used = self._used_slots()
        bad_slot = used & ((self.columns < 0) | (self.columns >= num_k_blocks))
        bad_slot[..., 1:] |= used[..., 1:] & (self.columns[..., 1:] <= self.columns[..., :-1])
        # Place 0 of a row stands for its count, place s + 1 for slot s.
        bad = torch.cat([bad_count.unsqueeze(-1), bad_slot], dim=-1).flatten()
        places = torch.arange(bad.numel(), device=bad.device)
        first = int(torch.where(bad, places, bad.numel()).min())
        if first == bad.numel():
            return
        row, place = divmod(first, self.capacity + 1)
        head, row = divmod(row, self.num_rows)
        batch, head = divmod(head, self.counts.shape[1])
        if place == 0:
            count = int(self.counts[batch, head, row])
            raise ValueError(
                f"counts[{batch}, {head}, {row}] = {count} is outside [0, {self.capacity}]"
            )
        entries = self.columns[batch, head, row].tolist()
        where = f"columns[{batch}, {head}, {row}, {place - 1}] = {entries[place - 1]}"
        if not 0 <= entries[place - 1] < num_k_blocks:
            raise ValueError(f"{where} is outside [0, {num_k_blocks})")
        raise ValueError(
            f"{where} is not above the entry before it ({entries[place - 2]}): rows must be "
            "strictly increasing, canonicalize() sorts them"
        )

    def canonicalize(self, num_k_blocks: int) -> BlockIndex:
        """Drops invalid ids, sorts each row and removes duplicates. Device only, no host sync.

        The capacity stays the same; the freed entries hold -1.
        """
        valid = self._valid_slots(num_k_blocks)
        return index_of_candidates(self.columns, valid, num_k_blocks, self.block_q, self.block_k)

    @classmethod
    def from_dense(cls, mask: Tensor, block_q: int, block_k: int) -> BlockIndex:
        """From a bool block mask ``[B, H, nQ, nK]``, ``[H, nQ, nK]`` or ``[nQ, nK]``. No host sync.

        Missing leading dimensions become 1. The capacity is nK.
        """
        _require_tensor("mask", mask, (2, 3, 4))
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        mask = _with_leading(mask, 4)
        num_k_blocks = mask.shape[-1]
        ids = torch.arange(num_k_blocks, dtype=torch.int32, device=mask.device).expand(mask.shape)
        return index_of_candidates(ids, mask, num_k_blocks, block_q, block_k)

    def to_dense(self, num_k_blocks: int) -> Tensor:
        """bool ``[B, Hidx, nQ, nK]``. Invalid ids are dropped, duplicates merge. No host sync."""
        valid = self._valid_slots(num_k_blocks)
        slots = torch.where(valid, self.columns, num_k_blocks).long()
        mask = torch.zeros(
            (*self.counts.shape, num_k_blocks + 1), dtype=torch.bool, device=self.device
        )
        return mask.scatter_(-1, slots, True)[..., :num_k_blocks].contiguous()

    @classmethod
    def from_csr(
        cls,
        indptr: Tensor,
        indices: Tensor,
        block_q: int,
        block_k: int,
        *,
        capacity: int | None = None,
    ) -> BlockIndex:
        """From compressed rows that share one flat list of ids.

        Args:
            indptr: integers ``[B, H, nQ + 1]``, ``[H, nQ + 1]`` or ``[nQ + 1]``. Row r of list
                (b, h) is ``indices[indptr[b, h, r] : indptr[b, h, r + 1]]``: offsets count from
                the start of ``indices`` for every (b, h).
            indices: integers ``[nnz]``, KV block ids.
            capacity: entries per row; longer rows are cut. None: the longest row, which costs one
                host sync.
        """
        _require_tensor("indptr", indptr, (1, 2, 3))
        _require_tensor("indices", indices, (1,))
        for name, tensor in (("indptr", indptr), ("indices", indices)):
            if tensor.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
        indptr = _with_leading(indptr, 3).long()
        lengths = indptr[..., 1:] - indptr[..., :-1]
        if capacity is None:
            capacity = int(lengths.max()) if lengths.numel() else 0
        slots = torch.arange(capacity, device=indptr.device)
        used = slots < lengths.unsqueeze(-1)
        if indices.numel() == 0:
            columns = torch.full(used.shape, -1, dtype=torch.int32, device=indptr.device)
        else:
            places = (indptr[..., :-1, None] + slots).clamp(0, indices.numel() - 1)
            columns = torch.where(used, indices[places].int(), -1)
        counts = lengths.clamp(0, capacity).int()
        return cls(counts, columns, block_q, block_k)

    def to_csr(self) -> tuple[Tensor, Tensor]:
        """``(indptr int32 [B, Hidx, nQ + 1], indices int32 [nnz])`` as ``from_csr`` takes them.

        Entries are copied as they are. One host sync (nnz is a shape).
        """
        used = self._used_slots()
        lengths = used.sum(-1)
        list_lengths = lengths.sum(-1)
        list_starts = list_lengths.flatten().cumsum(0).view_as(list_lengths) - list_lengths
        row_starts = torch.nn.functional.pad(lengths.cumsum(-1), (1, 0))
        return (list_starts.unsqueeze(-1) + row_starts).int(), self.columns[used]

    @classmethod
    def from_flex(cls, block_mask: BlockMask, *, causal: bool = False) -> BlockIndex:
        """From a FlexAttention ``BlockMask``: the union of its full and partial blocks.

        A BlockIndex cannot carry ``mask_mod``. Partial blocks are therefore accepted only with
        ``causal=True``, by which the caller states that causality is the only reason for them and
        that attention will be called with ``causal=True``. One host sync otherwise, to check that
        there is no partial block. ``create_block_mask`` also marks a ragged last block as partial.

        Raises:
            ValueError: there are partial blocks and ``causal`` is False.
        """
        from attnsieve import _flex

        return _flex.index_from_block_mask(block_mask, causal)

    def to_flex(self, seqlen_q: int, seqlen_k: int, *, causal: bool = False) -> BlockMask:
        """A FlexAttention ``BlockMask`` of the same meaning. No host sync.

        With ``causal`` (bottom-right), blocks that the diagonal cuts become partial. ``mask_mod``
        states blocks and causality in full, because uncompiled FlexAttention looks at nothing else.
        Query heads must equal Hidx, or Hidx must be 1.
        """
        from attnsieve import _flex

        return _flex.block_mask_from_index(self, seqlen_q, seqlen_k, causal)

    @classmethod
    def from_flashinfer_bsr(
        cls,
        indptr: Tensor,
        indices: Tensor,
        block_q: int,
        block_k: int,
        *,
        capacity: int | None = None,
    ) -> BlockIndex:
        """From the arguments of FlashInfer's ``BlockSparseAttentionWrapper.plan``.

        ``indptr [nQ + 1]``, ``indices [nnz]``, R = block_q, C = block_k. One pattern for all heads,
        so the result has B = Hidx = 1. ``capacity`` and host syncs as in ``from_csr``.
        """
        _require_tensor("indptr", indptr, (1,))
        return cls.from_csr(indptr, indices, block_q, block_k, capacity=capacity)

    def to_flashinfer_bsr(self) -> tuple[Tensor, Tensor]:
        """``(indptr int32 [nQ + 1], indices int32 [nnz])``. One host sync.

        Raises:
            ValueError: there is more than one list; FlashInfer's BSR has one for all heads.
        """
        if self.counts.shape[:2] != (1, 1):
            raise ValueError(
                "FlashInfer BSR holds one pattern for all heads: counts must be [1, 1, nQ], "
                f"got {_shape(self.counts)}"
            )
        indptr, indices = self.to_csr()
        return indptr[0, 0], indices

    @classmethod
    def from_cudnn(
        cls, q2k_block_index: Tensor, q2k_block_count: Tensor, block_q: int, block_k: int
    ) -> BlockIndex:
        """From cuDNN block-sparse attention's lists: ``q2k_block_index [B, H, nQ, topk]`` and the
        number of entries used per row, ``[B, H, nQ]``, both int32. Shares the tensors' memory."""
        return cls(q2k_block_count, q2k_block_index, block_q, block_k)

    def to_cudnn(self) -> tuple[Tensor, Tensor]:
        """``(q2k_block_index [B, Hidx, nQ, capacity], q2k_block_count [B, Hidx, nQ])``, int32.

        Unused entries are 0, so that a reader which prefetches them stays inside the tensors.
        """
        used = self._used_slots()
        return torch.where(used, self.columns, 0), self.counts.clamp(0, self.capacity)

    def density(
        self,
        seqlen_q: int,
        seqlen_k: int,
        *,
        causal: bool = False,
        window: tuple[int, int] | None = None,
    ) -> Tensor:
        """Kept (query, key) pairs over all visible pairs, as a float64 scalar on the device.

        Pairs hidden by the causal or window mask count on neither side; blocks listed twice count
        twice. 0 when nothing is visible. No host sync.
        """
        num_k_blocks = -(-seqlen_k // self.block_k)
        valid = self._valid_slots(num_k_blocks)
        first_keys = self.columns.long() * self.block_k
        last_keys = (first_keys + self.block_k).clamp(max=seqlen_k)
        left, right = window if window is not None else (-1, -1)
        right = 0 if causal else right
        kept = torch.zeros((), dtype=torch.int64, device=self.device)
        visible = torch.zeros((), dtype=torch.int64, device=self.device)
        block_rows = torch.arange(self.num_rows, device=self.device) * self.block_q
        for row_in_block in range(min(self.block_q, seqlen_q)):
            rows = block_rows + row_in_block
            diagonal = rows + (seqlen_k - seqlen_q)
            begin = (diagonal - left).clamp(min=0) if left >= 0 else torch.zeros_like(rows)
            end = diagonal + right + 1 if right >= 0 else torch.full_like(rows, seqlen_k)
            end = torch.where(rows < seqlen_q, end.clamp(max=seqlen_k), 0)
            visible += (end - begin).clamp(min=0).sum()
            overlap = torch.minimum(last_keys, end[:, None])
            overlap = overlap - torch.maximum(first_keys, begin[:, None])
            kept += torch.where(valid, overlap.clamp(min=0), 0).sum()
        lists = self.counts.shape[0] * self.counts.shape[1]
        return kept.double() / (visible * lists).clamp(min=1)

    def _used_slots(self) -> Tensor:
        """bool like ``columns``: the entries that ``counts`` covers."""
        return used_slots(self.columns, self.counts)

    def _valid_slots(self, num_k_blocks: int) -> Tensor:
        """The used entries whose id is in range."""
        return self._used_slots() & (self.columns >= 0) & (self.columns < num_k_blocks)


def used_slots(columns: Tensor, counts: Tensor) -> Tensor:
    """bool like ``columns``: the entries that ``counts`` covers."""
    return torch.arange(columns.shape[-1], device=columns.device) < counts.unsqueeze(-1)


def index_of_candidates(
    ids: Tensor, valid: Tensor, num_k_blocks: int, block_q: int, block_k: int
) -> BlockIndex:
    """Canonical index of the ids marked valid; the capacity is the candidates' number."""
    # num_k_blocks sorts behind every valid id and marks what is dropped.
    ids = torch.where(valid, ids.int(), num_k_blocks).sort(-1).values
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[..., 1:] = ids[..., 1:] == ids[..., :-1]
    ids = torch.where(repeated, num_k_blocks, ids).sort(-1).values
    kept = ids < num_k_blocks
    counts = kept.sum(-1, dtype=torch.int32)
    return BlockIndex(counts, torch.where(kept, ids, -1), block_q, block_k)


def _with_leading(tensor: Tensor, rank: int) -> Tensor:
    return tensor[(None,) * (rank - tensor.dim())]


def _require_tensor(name: str, tensor: Tensor, ranks: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() not in ranks:
        wanted = " or ".join(str(rank) for rank in ranks)
        raise ValueError(f"{name} must have {wanted} dimensions, got shape {_shape(tensor)}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _flatten(index: BlockIndex) -> tuple[list[Tensor], tuple[int, int]]:
    return [index.counts, index.columns], (index.block_q, index.block_k)


def _flatten_with_keys(index: BlockIndex) -> tuple[list, tuple[int, int]]:
    leaves, context = _flatten(index)
    names = ("counts", "columns")
    return [(pytree.GetAttrKey(n), x) for n, x in zip(names, leaves, strict=True)], context


def _unflatten(leaves: list, context: tuple[int, int]) -> BlockIndex:
    # Tree utilities rebuild nodes around placeholders that are no tensors: no checks here.
    index = object.__new__(BlockIndex)
    fields = ("counts", "columns", "block_q", "block_k")
    for name, value in zip(fields, (*leaves, *context), strict=True):
        object.__setattr__(index, name, value)
    return index


pytree.register_pytree_node(
    BlockIndex,
    _flatten,
    _unflatten,
    serialized_type_name="attnsieve.BlockIndex",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=_flatten_with_keys,
)
