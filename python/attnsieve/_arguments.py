"""What the public functions check and convert before they call an op."""

from __future__ import annotations

import torch
from torch import Tensor

from attnsieve.index import BlockIndex
from attnsieve.token_index import TokenIndex

Window = tuple[int, int]

DEFAULT_BLOCK = 64  # query rows, and keys, of a block

_UNSUPPORTED = "attnsieve unsupported: "  # status.h, Unsupported::kPrefix


def call_op(op, *args):
    """Calls a torch op; a refusal of the library becomes NotImplementedError.

    The ops have no backward yet. Refusing here, instead of registering one that raises, keeps a
    Python autograd layer (about 10 us a call) out of every forward.
    """
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, Tensor) and arg.requires_grad:
                raise NotImplementedError(
                    f"{op} has no backward yet: call it under torch.no_grad() or detach its inputs"
                )
    try:
        return op(*args)
    except RuntimeError as error:
        text = str(error)
        if _UNSUPPORTED not in text:
            raise
        message = text[text.index(_UNSUPPORTED) + len(_UNSUPPORTED) :].split("\nException raised")[
            0
        ]
        raise NotImplementedError(message) from None


def require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def window_sides(window: Window | None) -> Window:
    if window is None:
        return -1, -1
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise ValueError(f"window: expected a pair (left, right) or None, got {window!r}")
    return window[0], window[1]


def default_scale(q: Tensor, softmax_scale: float | None) -> float:
    if softmax_scale is not None:
        return softmax_scale
    if q.shape[-1] == 0:
        raise ValueError("q: head_dim must be positive")
    return q.shape[-1] ** -0.5


def check_head_scale(name: str, scale: Tensor | None, cache: Tensor, num_kv_heads: int) -> None:
    """A float8 cache has a scale per KV head, other caches have none."""
    coded = cache.dtype == torch.float8_e4m3fn
    if coded != (scale is not None):
        need = "must be given" if coded else "has no meaning"
        raise ValueError(f"{name}: {need} with caches of dtype {cache.dtype}")
    if scale is None:
        return
    require_tensor(name, scale)
    if scale.dtype != torch.float32 or scale.shape != (num_kv_heads,):
        got = f"{scale.dtype} {list(scale.shape)}"
        raise ValueError(f"{name}: expected float32 [{num_kv_heads}] (KV heads), got {got}")


def key_scale_of(keys: Tensor, k_scale: Tensor | None, heads_last: bool) -> Tensor | None:
    """``k_scale [Hkv]`` as :func:`attnsieve.proxy_scores` takes it for keys or bounds: a view.

    Args:
        keys: ``[..., Hkv, D]`` where ``heads_last``, otherwise ``[..., Hkv, n, D]``.
    """
    if k_scale is None:
        return None
    return (k_scale if heads_last else k_scale.unsqueeze(-1)).expand(keys.shape[:-1])


def lambda_arguments(
    threshold: float | Tensor | None, q: Tensor, cu_seqlens_q: Tensor | None = None
) -> tuple[float | None, Tensor | None]:
    """A threshold as the ops take it: (one number, None) or (None, ``[B, Hq]``)."""
    if threshold is None:
        return None, None
    if isinstance(threshold, Tensor):
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        if threshold.device != q.device:
            raise ValueError(f"threshold: must be on q's device, got {threshold.device}")
        return None, _lambda_table(threshold, batch, q.shape[1])
    if not isinstance(threshold, int | float):
        raise TypeError(
            f"threshold: expected a float, a tensor or None, got {type(threshold).__name__}"
        )
    if not threshold >= 0:
        raise ValueError(f"threshold: expected a number >= 0, got {threshold}")
    return float(threshold), None


def _lambda_table(threshold: Tensor, batch: int, num_heads: int) -> Tensor:
    """``[]``, ``[B]``, ``[Hq]`` or ``[B or 1, Hq or 1]`` as a view ``[B, Hq]``."""
    if threshold.dtype != torch.float32:
        raise ValueError(f"threshold: expected dtype Float, got {threshold.dtype}")
    sizes = list(threshold.shape)
    if len(sizes) == 1 and sizes[0] == batch == num_heads > 1:
        raise ValueError(
            f"threshold: {batch} values fit the batch and the query heads; give two dimensions, "
            f"[{batch}, 1] or [1, {num_heads}]"
        )
    if sizes == [batch]:
        threshold = threshold.unsqueeze(1)
    elif sizes == [num_heads]:
        threshold = threshold.unsqueeze(0)
    fits = all(
        n in (1, whole) for n, whole in zip(threshold.shape, (batch, num_heads), strict=False)
    )
    if threshold.dim() not in (0, 2) or not fits:
        raise ValueError(
            f"threshold: expected a float or a tensor of shape [], [{batch}] (batch), "
            f"[{num_heads}] (query heads) or [{batch}, {num_heads}], got shape {sizes}"
        )
    return threshold.expand(batch, num_heads)


def check_values(
    q: Tensor,
    k: Tensor,
    index: BlockIndex | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
) -> None:
    """Reads offsets, tables and index on the host and raises for the first bad value."""
    longest_k = k.shape[-2]
    for name, offsets, total in (
        ("cu_seqlens_q", cu_seqlens_q, q.shape[0]),
        ("cu_seqlens_k", cu_seqlens_k, k.shape[0]),
    ):
        if offsets is None:
            continue
        lengths = _check_offsets(name, offsets, total)
        if name == "cu_seqlens_k":
            longest_k = max(lengths, default=0)
    if block_table is not None and seq_lens is not None:
        longest_k = _check_pages(k.shape[0], k.shape[1], block_table, seq_lens)
    if index is not None:
        index.validate(-(-longest_k // index.block_k))


def check_decode_values(
    cache: Tensor,
    index: TokenIndex | None,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
) -> None:
    """Reads lengths, tables and index on the host and raises for the first bad value."""
    check_lengths(cache.shape[0], cache.shape[1], cache.shape[2], block_table, seq_lens)
    lengths = cache.shape[2] if seq_lens is None else seq_lens
    if index is not None and index.physical:
        index.validate(cache.shape[0] * cache.shape[1])
    elif index is not None:
        index.validate(-(-lengths // index.page_size))


def check_lengths(
    num_pages: int,
    page_size: int,
    capacity: int,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
) -> None:
    """The lengths of a cache of ``capacity`` keys, or where there is a table, of pages."""
    if seq_lens is None:
        return
    if block_table is not None:
        _check_pages(num_pages, page_size, block_table, seq_lens)
        return
    for b, length in enumerate(seq_lens.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(f"seq_lens[{b}] = {length} is outside [0, {capacity}]")


def check_append_values(
    k: Tensor,
    cache: Tensor,
    block_table: Tensor | None,
    seq_lens: Tensor,
    cu_seqlens: Tensor | None,
) -> None:
    """Reads lengths, offsets and tables on the host: every new row must have a place."""
    batch = seq_lens.shape[0] if cu_seqlens is not None or k.dim() != 4 else k.shape[0]
    _check_per_sequence(batch, seq_lens=seq_lens, block_table=block_table, cu_seqlens=cu_seqlens)
    lengths = seq_lens.tolist()
    counts = [k.shape[-2]] * len(lengths)
    if cu_seqlens is not None:
        counts = _check_offsets("cu_seqlens", cu_seqlens, k.shape[0])
    page_size, capacity = cache.shape[1], cache.shape[2]
    tables = [[]] * len(lengths)
    if block_table is not None:
        tables, capacity = block_table.tolist(), block_table.shape[1] * page_size
    for b, (length, count, pages) in enumerate(zip(lengths, counts, tables, strict=True)):
        if not count <= length <= capacity:
            raise ValueError(
                f"seq_lens[{b}] = {length} is outside [{count}, {capacity}]: it counts the "
                f"{count} new rows"
            )
        first = (length - count) // page_size
        for slot, page in enumerate(pages[first : -(-length // page_size)], first):
            if count > 0 and not 0 <= page < cache.shape[0]:
                raise ValueError(
                    f"block_table[{b}, {slot}] = {page} is outside [0, {cache.shape[0]})"
                )


def _check_per_sequence(batch: int, **tensors: Tensor | None) -> None:
    """Shapes of what the host is about to read, before an op could check them."""
    shapes = dict(seq_lens=(batch,), block_table=(batch, None), cu_seqlens=(batch + 1,))
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dim() != len(shapes[name]) or tensor.shape[0] != shapes[name][0]:
            size = "[B, max_pages]" if name == "block_table" else list(shapes[name])
            raise ValueError(f"{name}: expected {size} with B = {batch}, got {list(tensor.shape)}")


def _check_offsets(name: str, offsets: Tensor, total: int) -> list[int]:
    """Checks token offsets; returns the lengths between them."""
    values = offsets.tolist()
    lengths = [end - begin for begin, end in zip(values, values[1:], strict=False)]
    if values[0] != 0 or values[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(f"{name}: expected ascending offsets from 0 to {total}, got {values}")
    return lengths


def _check_pages(num_pages: int, page_size: int, block_table: Tensor, seq_lens: Tensor) -> int:
    """Checks lengths and the table entries that they cover; returns the keys of a full row."""
    _check_per_sequence(block_table.shape[0], seq_lens=seq_lens, block_table=block_table)
    capacity = block_table.shape[1] * page_size
    tables = block_table.tolist()
    for b, (length, pages) in enumerate(zip(seq_lens.tolist(), tables, strict=True)):
        if not 0 <= length <= capacity:
            raise ValueError(f"seq_lens[{b}] = {length} is outside [0, {capacity}]")
        for slot, page in enumerate(pages[: -(-length // page_size)]):
            if not 0 <= page < num_pages:
                raise ValueError(f"block_table[{b}, {slot}] = {page} is outside [0, {num_pages})")
    return capacity
