"""What a method is: one attention call of a model, from q, k, v to out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnsieve.index import BlockIndex
from attnsieve.ops import block_sparse_attention


class Method(ABC):
    """Computes one layer's attention; stateless, so one object serves every layer and call.

    Attributes:
        min_seqlen_q: calls with fewer query rows (decode steps) are served by :class:`Dense`
            instead. 64, the rows that share one decision of the kernels, unless a method says
            otherwise.
    """

    min_seqlen_q: ClassVar[int] = 64

    @abstractmethod
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        window: tuple[int, int] | None = None,
        softmax_scale: float | None = None,
        sink: Tensor | None = None,
        layer_idx: int | None = None,
    ) -> Tensor:
        """Attention over unpadded sequences.

        Args:
            q: ``[B, Hq, Sq, D]``.
            k, v: ``[B, Hkv, Sk, D]``; query head ``h`` reads KV head ``h // (Hq // Hkv)``.
            causal: query row i sees keys ``j <= i + Sk - Sq`` (aligned bottom-right).
            window: ``(left, right)`` keys around the same diagonal, -1 is unbounded.
            softmax_scale: ``1 / sqrt(D)`` when None.
            sink: one extra logit per query head, ``[Hq]``.
            layer_idx: the model's layer, for methods that treat layers differently.

        Returns:
            ``[B, Hq, Sq, D]`` in q's dtype.
        """


@dataclass(frozen=True)
class Dense(Method):
    """Every visible key, through :func:`attnsieve.block_sparse_attention` without an index."""

    min_seqlen_q: ClassVar[int] = 0

    def __call__(
        self, q, k, v, *, causal, window=None, softmax_scale=None, sink=None, layer_idx=None
    ) -> Tensor:
        return block_sparse_attention(
            q, k, v, causal=causal, window=window, softmax_scale=softmax_scale, sink=sink
        )


class BlockMethod(Method):
    """Score and select blocks, then attend to them. Subclasses write :meth:`select`."""

    @abstractmethod
    def select(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool,
        window: tuple[int, int] | None = None,
        softmax_scale: float | None = None,
        layer_idx: int | None = None,
    ) -> BlockIndex:
        """The blocks to attend to; arguments as in :meth:`Method.__call__`."""

    def __call__(
        self, q, k, v, *, causal, window=None, softmax_scale=None, sink=None, layer_idx=None
    ) -> Tensor:
        mask = dict(causal=causal, window=window, softmax_scale=softmax_scale)
        index = self.select(q, k, layer_idx=layer_idx, **mask)
        return self.attend(q, k, v, index, sink=sink, **mask)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, *, sink: Tensor | None, **mask
    ) -> Tensor:
        """Attention to the selected blocks, exact unless a method says otherwise.

        ``mask`` is causal, window and softmax_scale of :meth:`Method.__call__`.
        """
        return block_sparse_attention(q, k, v, index, sink=sink, **mask)
