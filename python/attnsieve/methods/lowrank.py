"""Tokens chosen by low-rank proxies of their keys (LRQK, Li et al., NeurIPS 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnsieve.cache import CachedKV
from attnsieve.lowrank import LowRankFit, lowrank_fit, lowrank_step, of_heads
from attnsieve.methods.decode import DecodeMethod, attend
from attnsieve.methods.newest import keys_at, newest_rows
from attnsieve.methods.proxies import attend_to_best, side_cache, with_room
from attnsieve.offload import WorkingSet
from attnsieve.ops_lowrank import low_rank_attention


@dataclass(frozen=True)
class Refinement:
    """What the steps of one row have made of a layer's fit, written in place.

    Attributes:
        fit: with their reconstructions.
        indices: int32 ``[B, lists, k]``, what the last of them attended to, -1 behind it.
    """

    fit: LowRankFit
    indices: Tensor


@dataclass(eq=False)
class LowRank(DecodeMethod):
    """The ``k`` tokens whose proxies of ``rank`` numbers score best, the newest among them.

    A prefill, or the first piece of one, fits projections of its queries and keys in every layer
    (:func:`attnsieve.lowrank_fit`); a step projects its own rows. Layers without a fit attend to
    everything.

    LRQK (arXiv:2510.23649) does not project a new row: with ``refine`` the numbers of the query and
    of the new key are those of :func:`attnsieve.lowrank_step`, whose resident keys are the tokens
    that the last step of one row attended to, none at the first. Steps of several rows project.
    What a token has changed in the reconstructions stays when it is taken back. On SmolLM2 refined
    steps choose worse than projected ones (bench/notes-lowrank.md).

    ``fits`` holds the projections by (sequence, layer) and is kept by :meth:`reset`; ``state``
    holds the proxies, made from the cache at the first step, with ``offload`` by the prefill, and
    of new keys after it, a fit's projections in the dtype of the queries and what refinement made
    of it.

    With ``offload`` the keys and values may lie in host memory
    (:class:`attnsieve.integrations.transformers_cache.LowRankCache`): a step of one row copies what
    it attends to into k slots a head on the device, where it was not attended to in the last steps
    (``working_sets``, by (sequence, layer)). The results are the same. Steps of several rows, and
    caches in pages, are attended to where they lie.

    Attributes:
        k: budget; the newest ``recent`` tokens are inside it.
        share: "kv_head", or "query_head" as published: see :func:`attnsieve.lowrank_fit`.
        list_heads: "q" one list per query head, as published, "kv" (default) or "one"; with
            ``offload`` "kv", with ``refine`` and ``share="kv_head"`` not "q".
        refine: as published; not with ``offload``.
    """

    k: int = 2048
    rank: int = 32
    recent: int = 64
    share: str = "kv_head"
    method: str = "lrqk"
    list_heads: str = "kv"
    offload: bool = False
    refine: bool = False
    fits: dict[tuple[int, int], LowRankFit] = field(default_factory=dict, repr=False)
    working_sets: dict[tuple[int, int], WorkingSet] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.offload and self.list_heads != "kv":
            raise ValueError(f"list_heads: offload needs 'kv', got {self.list_heads!r}")
        if self.refine and self.offload:
            raise ValueError("refine: not with offload")
        if self.refine and self.share == "kv_head" and self.list_heads == "q":
            raise ValueError("list_heads: refine with share='kv_head' needs 'kv' or 'one', got 'q'")

    def reset(self) -> None:
        super().reset()
        self.working_sets.clear()

    def prefill(self, q, k, *, layer_idx=0, sequence=0, begin=0) -> None:
        place = sequence, layer_idx
        for stale in (place, ("fit", *place), ("refined", *place)):
            self.state.pop(stale, None)
        self.working_sets.pop(place, None)
        if begin == 0 or place not in self.fits:
            self.fits[place] = lowrank_fit(q, k, self.rank, share=self.share, method=self.method)
        if begin == 0 and self.offload:  # while the keys are on the device
            self.state[place] = with_room(self.fits[place].keys(k))

    def __call__(
        self, q, cache, *, layer_idx=0, sequence=0, softmax_scale=None, sink=None
    ) -> Tensor:
        options = dict(softmax_scale=softmax_scale, sink=sink)
        if (sequence, layer_idx) not in self.fits:
            return attend(q, cache, None, **options)
        if self.refine and q.shape[2] == 1:
            return self._refined(q, cache, (sequence, layer_idx), **options)
        fit = self._projecting((sequence, layer_idx), q.dtype)
        proxies = side_cache(self.state, (sequence, layer_idx), cache, q, fit.keys)
        if self.offload and q.shape[2] == 1 and cache.block_table is None:
            return low_rank_attention(
                q,
                cache.k_cache,
                cache.v_cache,
                projection=fit.to_q,
                proxy=proxies,
                k=self.k,
                recent_tokens=min(self.recent, self.k),
                working_set=self._working_set((sequence, layer_idx), q, cache),
                seq_lens=cache.seq_lens,
                **options,
            )
        return attend_to_best(q, cache, q, proxies, projection=fit.to_q, **self._budget, **options)

    @property
    def _budget(self) -> dict:
        return dict(k=self.k, recent=self.recent, list_heads=self.list_heads)

    def _projecting(self, place: tuple[int, int], dtype: torch.dtype) -> LowRankFit:
        """The fit with projections in the dtype of the queries, made once."""
        held = self.state.get(("fit", *place))
        if held is None:
            held = self.state[("fit", *place)] = self.fits[place].projecting(dtype)
        return held

    def _refined(self, q: Tensor, cache: CachedKV, place: tuple[int, int], **options) -> Tensor:
        """A step of one row with the numbers of :func:`lowrank_step`."""
        held: Refinement | None = self.state.get(("refined", *place))
        fit = self._projecting(place, q.dtype) if held is None else held.fit
        proxies = side_cache(self.state, place, cache, q, fit.keys, rows=0)
        newest = newest_rows(self.state, place, cache, q.shape[0], 1)
        if held is None:
            none = proxies[:, :, :0]
            residents = none.new_empty(*none.shape[:3], q.shape[3]), none
        else:
            residents = _residents(held.indices, cache, proxies, newest.begin, q.dtype)
        key = newest.keys(cache, q.dtype)
        refined, of_query, of_key = lowrank_step(fit, q, key, *residents)
        newest.put(proxies, of_key)
        out, index = attend_to_best(
            q, cache, of_query, proxies, return_index=True, **self._budget, **options
        )
        if held is None:
            self.state[("refined", *place)] = Refinement(refined, index.indices)
        else:
            held.fit.from_q.copy_(refined.from_q)
            held.fit.from_k.copy_(refined.from_k)
            held.indices.copy_(index.indices)
        return out

    def _working_set(self, place: tuple[int, int], q: Tensor, cache: CachedKV) -> WorkingSet:
        held = self.working_sets.get(place)
        if held is None:
            shape = q.shape[0], cache.num_kv_heads, self.k, q.shape[3]
            held = WorkingSet(*shape, dtype=cache.k_cache.dtype, device=q.device)
            self.working_sets[place] = held
        return held

    @property
    def hit_rate(self) -> float:
        """Share of the tokens attended to that were in a slot; synchronises."""
        moved = [held.moved.tolist() for held in self.working_sets.values()]
        wanted, copied = (sum(numbers) for numbers in zip(*moved, strict=True)) if moved else (0, 0)
        return 1.0 - copied / wanted if wanted else 1.0

    @property
    def bytes_moved(self) -> int:
        """Copied into slots; synchronises."""
        return sum(held.bytes_moved for held in self.working_sets.values())


def _residents(
    indices: Tensor, cache: CachedKV, proxies: Tensor, newest: Tensor | int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys ``[B, H, n, D]`` and proxies ``[B, H, n, r]`` of what lists name before ``newest``.

    Zeros where a list is shorter, or names tokens that were taken back.
    """
    heads = proxies.shape[1]
    lists = of_heads(indices, heads).long()
    known = (lists >= 0) & (lists < newest)
    lists = lists.where(known, 0)
    keys = keys_at(cache, lists.unflatten(1, (cache.num_kv_heads, -1)).flatten(2), dtype)
    keys = keys.unflatten(2, (-1, lists.shape[2])).flatten(1, 2)
    numbers = proxies.gather(2, lists[..., None].expand(-1, -1, -1, proxies.shape[3]))
    return keys.where(known[..., None], 0), numbers.where(known[..., None], 0)
