"""Tokens chosen by what queries will want of them (TriAttention, Mao et al., ICML 2026)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnsieve.cache import CachedKV
from attnsieve.lowrank import of_heads
from attnsieve.methods.decode import DecodeMethod, Kept, attend, num_lists
from attnsieve.methods.proxies import side_cache
from attnsieve.ops_cache import proxy_scores
from attnsieve.ops_decode import select_topk
from attnsieve.rotary import from_pairs, rotation, to_pairs

# Distances to the queries to come that a score looks at: powers of 2 up to 65536.
_OFFSETS = 17
# Rows whose queries are turned back at once.
_CHUNK = 4096


@dataclass(frozen=True)
class QueryCentres:
    """Where the queries of each head lie before RoPE, as complex numbers of their pairs of dims.

    Attributes:
        mean: ``[B or 1, Hq, D / 2]``. norm: the same of their absolute values, real. complex64 and
            float32, or double of both for double queries.
    """

    mean: Tensor
    norm: Tensor


def query_centres(
    q: Tensor, inv_freq: Tensor, *, begin: int = 0, interleaved: bool = False
) -> QueryCentres:
    """The centres of queries that RoPE has turned.

    Args:
        q: ``[B, Hq, S, D]`` at the positions ``begin, begin + 1 ...``. A factor that RoPE scales by
            (``attention_scaling`` of some models) stays in them, where the score needs it.
        inv_freq: ``[D / 2]``, the angle per position of each pair.
        interleaved: a pair is two neighbouring dims, not ``i`` and ``i + D / 2``.

    Raises:
        ValueError: inv_freq has another size.
    """
    _check_frequencies(inv_freq, q.shape[3])
    inv_freq = inv_freq.to(q.device)
    total, norms = 0.0, 0.0
    for first in range(0, q.shape[2], _CHUNK):
        part = q[:, :, first : first + _CHUNK]
        part = part.to(torch.promote_types(q.dtype, torch.float32))
        pairs = torch.view_as_complex(to_pairs(part, interleaved).contiguous())
        positions = torch.arange(part.shape[2], device=q.device) + (begin + first)
        back = rotation(positions, inv_freq).conj().to(pairs.dtype)
        total = total + (pairs * back).sum(2)
        norms = norms + pairs.abs().sum(2)
    return QueryCentres(total / q.shape[2], norms / q.shape[2])


def effective_queries(
    centres: QueryCentres,
    inv_freq: Tensor,
    positions: Tensor,
    *,
    mean: bool = True,
    interleaved: bool = False,
) -> Tensor:
    """``[B, Hq, 1, D]``: what a key's product with says of the queries ahead.

    A query of pre-RoPE centre E at distance ``t - p + d`` from a key of pre-RoPE pairs k gives the
    logit ``sum_f |E_f| |k_f| cos(w_f (t - p + d) + arg(E_f conj(k_f)))``, which is the product of
    the key as RoPE turned it with E turned to ``t + d``. Its mean over d = 1, 2, 4 ... 65536 is
    that with the mean of the turned ones; with ``mean=False`` each has a row, ``[B, Hq, 17, D]``.

    Args:
        positions: t of each sequence, integers ``[B]``.
    """
    ahead = 2 ** torch.arange(_OFFSETS, device=positions.device)
    turns = rotation(positions[:, None] + ahead, inv_freq.to(positions.device))  # [B, 17, D / 2]
    if mean:
        turns = turns.mean(1, keepdim=True)
    turned = centres.mean.unsqueeze(2) * turns.unsqueeze(1)
    return from_pairs(torch.view_as_real(turned), interleaved).to(centres.norm.dtype)


@dataclass(eq=False)
class TriAttention(DecodeMethod):
    """Every ``period`` tokens the ``k`` keys that queries to come will want; newer keys besides.

    Before RoPE the queries of a head lie around a centre E. A key's score for one query head is the
    mean over distances ahead, 1, 2, 4 ... 65536, of the logit that E would give it, and for the
    spread of the queries ``sum_f (mean|q_f| - |E_f|) |k_f|`` over the pairs f of dims (arXiv
    2604.04921). The first part is the product of the cached key with one effective query
    (:func:`effective_queries`), so scoring reads the keys once and needs no positions; the second
    is one number per key and query head, held beside the cache.

    What differs from the authors' code: keys are left out, not evicted, and a later selection may
    take them again. Each layer selects for itself (theirs: also over all layers). Scores are made
    alike per query head by mean and deviation over the keys that compete (``normalize``; their
    default for vLLM, not for transformers), then the largest of the query heads of a list counts;
    ``list_heads="one"`` chooses what their union over heads does. Scoring looks ahead from the
    first new row.

    A prefill, or the first piece of one, finds the centres of its queries; ``calibration`` holds
    them for each layer, as the authors do once per model. Layers without either attend to
    everything. ``centres`` is by (sequence, layer) and kept by :meth:`reset`, like ``prompts``, the
    lengths of the prompts; ``state`` holds the lists and the keys' numbers. When to select is
    decided on the host, by counting: the lists of one CUDA graph stay what they are.

    Attributes:
        inv_freq: ``[D / 2]``, the model's, such as ``model.model.rotary_emb.inv_freq``.
        k: budget of a list, among the keys before a selection; the newest ``recent`` of these are
            inside it, and so is the prompt with ``keep_prompt``.
        period: tokens from one selection to the next. 0 selects in every step.
        aggregate: "mean" over the distances ahead, or "max".
        keep_prompt: as published, where prompts are short. A prompt that leaves no room raises.
        list_heads: "q" one list per query head, "kv" (default) or "one".
        interleaved: a pair is two neighbouring dims, not ``i`` and ``i + D / 2``.
    """

    inv_freq: Tensor
    k: int = 2048
    period: int = 128
    recent: int = 128
    aggregate: str = "mean"
    normalize: bool = True
    keep_prompt: bool = True
    list_heads: str = "kv"
    interleaved: bool = False
    calibration: Sequence[QueryCentres] | None = None
    centres: dict[tuple[int, int], QueryCentres] = field(default_factory=dict, repr=False)
    prompts: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.aggregate not in ("mean", "max"):
            raise ValueError(f"aggregate: expected 'mean' or 'max', got {self.aggregate!r}")
        if self.period < 0:
            raise ValueError(f"period: expected at least 0, got {self.period}")
        if not 0 <= self.recent <= self.k:
            raise ValueError(f"recent: expected 0 to k = {self.k}, got {self.recent}")

    def prefill(self, q, k, *, layer_idx=0, sequence=0, begin=0) -> None:
        place = sequence, layer_idx
        for what in ("lists", "norms"):
            self.state.pop((what, *place), None)
        self.prompts[place] = begin + q.shape[2]
        if self.calibration is None and (begin == 0 or place not in self.centres):
            rope = dict(begin=begin, interleaved=self.interleaved)
            self.centres[place] = query_centres(q, self.inv_freq, **rope)

    def __call__(
        self, q, cache, *, layer_idx=0, sequence=0, softmax_scale=None, sink=None
    ) -> Tensor:
        options = dict(softmax_scale=softmax_scale, sink=sink)
        place = sequence, layer_idx
        centres = self._centres(q, place)
        if centres is None:
            return attend(q, cache, None, **options)
        kept, age = self.state.get(("lists", *place), (None, 0))
        if kept is None or age >= self.period:
            kept, age = self._select(q, cache, centres, place, age), 0
        # In place: a CUDA graph that was captured between selections goes on reading it.
        torch.minimum(kept.begin, cache.lengths(q.shape[0]) - q.shape[2], out=kept.begin)
        self.state[("lists", *place)] = kept, age + q.shape[2]
        return attend(q, cache, kept.index, dense_begin=kept.begin, **options)

    def _centres(self, q: Tensor, place: tuple[int, int]) -> QueryCentres | None:
        if place not in self.centres and self.calibration is not None:
            layers = self.calibration
            if not 0 <= place[1] < len(layers):
                raise ValueError(
                    f"layer_idx: {place[1]} is none of {len(layers)} calibrated layers"
                )
            given = layers[place[1]]
            shape = q.shape[1], q.shape[3] // 2
            if given.mean.shape[1:] != shape or given.norm.shape[1:] != shape:
                raise ValueError(f"calibration: expected centres of {list(shape)}, heads and pairs")
            self.centres[place] = QueryCentres(given.mean.to(q.device), given.norm.to(q.device))
        return self.centres.get(place)

    def _select(
        self, q: Tensor, cache: CachedKV, centres: QueryCentres, place: tuple[int, int], age: int
    ) -> Kept:
        """Lists among the keys before the new rows; ``age`` keys came since the last ones."""
        self.inv_freq = self.inv_freq.to(q.device)
        begin = cache.lengths(q.shape[0]) - q.shape[2]
        prompt = self.prompts.get(place, 0) if self.keep_prompt else 0
        if prompt + self.recent > self.k:
            raise ValueError(
                f"k: {self.k} does not hold the prompt's {prompt} tokens and the newest "
                f"{self.recent}; give more, or keep_prompt=False"
            )
        scores = self._scores(q, cache, centres, place, begin, age)
        if self.normalize:
            scores = _alike(scores, prompt, begin - self.recent)
        lists = num_lists(self.list_heads, q, cache)
        index = select_topk(
            scores.unflatten(1, (lists, -1)).amax(2),
            self.k,
            seq_lens=begin,
            sink=prompt,
            recent=self.recent,
        )
        return Kept(index, begin)

    def _scores(
        self,
        q: Tensor,
        cache: CachedKV,
        centres: QueryCentres,
        place: tuple[int, int],
        begin: Tensor,
        age: int,
    ) -> Tensor:
        """float32 ``[B, Hq, N]``."""
        ahead = effective_queries(
            centres,
            self.inv_freq,
            begin,
            mean=self.aggregate == "mean",
            interleaved=self.interleaved,
        )
        logits = proxy_scores(
            ahead.to(q.dtype),
            cache.k_cache,
            key_scale=cache.key_scale,
            block_table=cache.block_table,
            seq_lens=begin,
            row_reduce="max",
            score_scale=1.0,
        )
        weights = centres.norm - centres.mean.abs()

        def spread(keys: Tensor) -> Tensor:
            norms = to_pairs(keys.float(), self.interleaved).norm(dim=-1)
            return (of_heads(norms, q.shape[1]) * weights.unsqueeze(2)).sum(-1, keepdim=True)

        rows = age + q.shape[2]
        return logits + side_cache(self.state, ("norms", *place), cache, q, spread, rows)[..., 0]


def _alike(scores: Tensor, first: int, end: Tensor) -> Tensor:
    """Scores ``[B, H, N]`` less their mean and over their deviation in ``[first, end[b])``."""
    columns = torch.arange(scores.shape[2], device=scores.device)
    competes = ((columns >= first) & (columns < end[:, None])).unsqueeze(1) & scores.isfinite()
    count = competes.sum(-1, keepdim=True).clamp(min=1)
    mean = scores.where(competes, 0.0).sum(-1, keepdim=True) / count
    square = (scores - mean).square().where(competes, 0.0).sum(-1, keepdim=True) / count
    return (scores - mean) / square.sqrt().clamp(min=1e-6)


def _check_frequencies(inv_freq: Tensor, head_dim: int) -> None:
    if inv_freq.shape != (head_dim // 2,):
        raise ValueError(
            f"inv_freq: expected [{head_dim // 2}], half of head_dim, got {list(inv_freq.shape)}"
        )
