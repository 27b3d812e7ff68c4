"""What a decode method is: one layer's attention in a decode step, over what is cached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnsieve.cache import CachedKV
from attnsieve.ops_decode import decode
from attnsieve.token_index import TokenIndex

MAX_DECODE_ROWS = 8  # new rows per sequence that decode takes


@dataclass(eq=False)
class DecodeMethod(ABC):
    """Computes one layer's attention of a decode step, and remembers what later calls reuse.

    Parameters are fields; what is remembered is in ``state`` alone, by (sequence, layer) or as the
    method says. One object serves all layers of one model for one batch at a time: call
    :meth:`reset` before another text.
    """

    state: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @abstractmethod
    def __call__(
        self,
        q: Tensor,
        cache: CachedKV,
        *,
        layer_idx: int = 0,
        sequence: int = 0,
        softmax_scale: float | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of the newest rows.

        Args:
            q: ``[B, Hq, Sq, D]``, Sq up to 8; the rows' own keys are in the cache.
            cache: the layer's keys and values; query head ``h`` reads KV head
                ``h // (Hq // Hkv)``.
            layer_idx: the model's layer. The layers of a step come in ascending order.
            sequence: tells apart sequences of a batch that are computed one by one.
            softmax_scale: ``1 / sqrt(D)`` when None.
            sink: one extra logit per query head, float32 ``[Hq]``.

        Returns:
            ``[B, Hq, Sq, D]`` in q's dtype.
        """

    def reset(self) -> None:
        """Forgets what earlier calls left."""
        self.state.clear()

    def prefill(
        self, q: Tensor, k: Tensor, *, layer_idx: int = 0, sequence: int = 0, begin: int = 0
    ) -> None:
        """What a new text begins with: queries ``[B, Hq, S, D]`` and keys ``[B, Hkv, S, D]``.

        Called for every layer of a prefill, and of each piece of one that comes in pieces, whose
        first row has the position ``begin``. A method that learns nothing from them forgets what
        earlier texts left.
        """
        self.reset()


@dataclass(eq=False)
class DenseDecode(DecodeMethod):
    """Every cached key, through :func:`attnsieve.decode` without an index."""

    def __call__(
        self, q, cache, *, layer_idx=0, sequence=0, softmax_scale=None, sink=None
    ) -> Tensor:
        return attend(q, cache, None, softmax_scale=softmax_scale, sink=sink)


def attend(q: Tensor, cache: CachedKV, index: TokenIndex | None, **options) -> Tensor:
    """:func:`attnsieve.decode` over a cache."""
    return decode(q, cache.k_cache, cache.v_cache, index, **cache.where, **cache.scales, **options)


def num_lists(list_heads: str, q: Tensor, cache: CachedKV) -> int:
    """Lists per sequence: "q" one per query head, "kv" per KV head, "one" for all."""
    counts = dict(q=q.shape[1], kv=cache.num_kv_heads, one=1)
    if list_heads not in counts:
        raise ValueError(f"list_heads: expected one of {list(counts)}, got {list_heads!r}")
    return counts[list_heads]


@dataclass(frozen=True)
class Kept:
    """Lists of an earlier step, to be used again.

    They were chosen among the keys below ``begin``, and later keys are attended to besides, so that
    every key was a candidate or is attended to.

    Attributes:
        index: one list per sequence and list head, for any number of new rows.
        begin: int32 ``[B]``.
        query: float32 ``[B, Hq * D]``, what the lists were chosen for; None where nobody asks.
    """

    index: TokenIndex
    begin: Tensor
    query: Tensor | None = None

    def before(self, q: Tensor, cache: CachedKV) -> Kept:
        """These lists for the rows of ``q``, which may stand where tokens were taken back."""
        first = cache.lengths(q.shape[0]) - q.shape[2]
        return Kept(self.index, torch.minimum(self.begin, first), self.query)

    def stale(self, query: Tensor, similarity: float) -> Tensor:
        """bool ``[B]``: whose query is now less similar (by cosine) than ``similarity``."""
        return ~(torch.cosine_similarity(query, self.query, dim=-1) >= similarity)

    def updated(self, stale: Tensor, new: Kept) -> Kept:
        """``new`` where ``stale``, else this: no sequence depends on another one."""

        def pick(ours: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(stale.view(-1, *[1] * (ours.dim() - 1)), theirs, ours)

        index = TokenIndex(
            pick(self.index.indices, new.index.indices), pick(self.index.counts, new.index.counts)
        )
        return Kept(index, pick(self.begin, new.begin), pick(self.query, new.query))


def mean_query(q: Tensor) -> Tensor:
    """float32 ``[B, Hq * D]``: the mean of the new rows."""
    return q.mean(2, dtype=torch.float32).flatten(1)
