"""Tokens chosen by the RoPE frequencies that rank them best (FASA, ICLR 2026)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnsieve.fasa_calibration import FASACalibration, contextual_agreement, dominant_dims
from attnsieve.methods.decode import DecodeMethod, attend
from attnsieve.methods.proxies import attend_to_best, side_cache


@dataclass(eq=False)
class FASA(DecodeMethod):
    """The ``k`` tokens of largest logit over the dominant pairs of dims, the newest among them.

    RoPE makes a logit the sum of D / 2 products of pairs of dims. The ``pairs`` pairs that agree
    best with whole logits about which keys matter stand for them
    (:func:`attnsieve.fasa_calibration.contextual_agreement`): a step reads ``2 * pairs`` numbers
    per key, packed beside the cache, and attends exactly to what scores best (arXiv 2602.03152,
    where 16 of 64 pairs and 256 tokens are used).

    In the paper pairs are found once per model: :meth:`calibrated` takes them from a file.
    Otherwise every prefill, or the first piece of one, finds its own from the newest of its rows;
    layers without any attend to everything.

    What differs from the authors' code is not known: it was not public. The summary that this
    follows names no window, and does not say which heads of a group share pairs.

    ``dims`` holds the dominant dims by (sequence, layer) and is kept by :meth:`reset`; ``state``
    holds those dims of the keys, ``[B, H, S, 2 * pairs]``, H = Hkv or with ``share="query_head"``
    Hq, packed from the cache at the first step and of new keys after it. A prefill must have been
    of the batch that is decoded.

    Attributes:
        k: budget; the newest ``recent`` tokens, at least 1, are inside it.
        pairs: a multiple of 4 up to D / 2. All of them choose what exact logits do.
        share: "kv_head", pairs of their own for each KV head, by the mean agreement of its query
            heads; or "query_head", which holds the dims once for each of them.
        list_heads: "q" one list per query head, "kv" (default) or "one".
        interleaved: a pair is two neighbouring dims, not ``i`` and ``i + D / 2`` as in most models.
        topk, rows: of the agreement, where a prefill finds the pairs.
        calibration: finds the pairs instead; its ``share`` and ``interleaved`` must be these.
    """

    k: int = 256
    pairs: int = 16
    recent: int = 1
    share: str = "kv_head"
    list_heads: str = "kv"
    interleaved: bool = False
    topk: int = 256
    rows: int = 16
    calibration: FASACalibration | None = None
    dims: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.recent < 1:
            raise ValueError(f"recent: expected at least 1, got {self.recent}")
        for name in ("share", "interleaved"):
            wanted = getattr(self.calibration, name, getattr(self, name))
            if getattr(self, name) != wanted:
                raise ValueError(f"{name}: the calibration is of {name} = {wanted!r}")

    @classmethod
    def calibrated(cls, calibration: FASACalibration, **options) -> FASA:
        """With the pairs of a calibration; ``options`` are the other fields."""
        shared = dict(share=calibration.share, interleaved=calibration.interleaved)
        return cls(calibration=calibration, **shared, **options)

    def prefill(self, q, k, *, layer_idx=0, sequence=0, begin=0) -> None:
        place = sequence, layer_idx
        self.state.pop(place, None)
        if self.calibration is None and (begin == 0 or place not in self.dims):
            options = dict(share=self.share, interleaved=self.interleaved)
            agreement = contextual_agreement(q, k, topk=self.topk, rows=self.rows, **options)
            self.dims[place] = dominant_dims(agreement, self.pairs, self.interleaved)

    def __call__(
        self, q, cache, *, layer_idx=0, sequence=0, softmax_scale=None, sink=None
    ) -> Tensor:
        options = dict(softmax_scale=softmax_scale, sink=sink)
        place = sequence, layer_idx
        dims = self.dims.get(place)
        if dims is None and self.calibration is not None:
            dims = self.dims[place] = self._calibrated_dims(q, cache.num_kv_heads, layer_idx)
        if dims is None:
            return attend(q, cache, None, **options)
        proxies = side_cache(self.state, place, cache, q, lambda keys: packed(keys, dims))
        return attend_to_best(
            q,
            cache,
            packed(q, dims),
            proxies,
            k=self.k,
            recent=self.recent,
            list_heads=self.list_heads,
            **options,
        )

    def _calibrated_dims(self, q: Tensor, num_kv_heads: int, layer_idx: int) -> Tensor:
        layers = self.calibration.agreement
        if not 0 <= layer_idx < len(layers):
            raise ValueError(f"layer_idx: {layer_idx} is none of {len(layers)} calibrated layers")
        agreement = torch.tensor(layers[layer_idx], device=q.device)
        heads = num_kv_heads if self.share == "kv_head" else q.shape[1]
        if agreement.shape != (heads, q.shape[3] // 2):
            raise ValueError(
                f"calibration: {list(agreement.shape)} heads and pairs, this layer has "
                f"{[heads, q.shape[3] // 2]}"
            )
        return dominant_dims(agreement, self.pairs, self.interleaved).unsqueeze(0)


def packed(x: Tensor, dims: Tensor) -> Tensor:
    """``dims [B or 1, H, r]`` of the rows ``[B, heads, S, D]``: ``[B, max(heads, H), S, r]``.

    Consecutive heads on one side share a head of the other.
    """
    shared = min(x.shape[1], dims.shape[1])
    rows, places = x.unflatten(1, (shared, -1)), dims.unflatten(1, (shared, -1)).unsqueeze(3)
    group = max(rows.shape[2], places.shape[2])
    rows = rows.expand(-1, -1, group, -1, -1)
    places = places.expand(x.shape[0], -1, group, x.shape[2], -1)
    return rows.gather(4, places).flatten(1, 2)
