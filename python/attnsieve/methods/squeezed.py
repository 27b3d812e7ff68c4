"""Prompt tokens chosen by the centroids of their keys (Squeezed Attention, Hooper et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnsieve.kmeans import kmeans
from attnsieve.methods.decode import DecodeMethod, attend
from attnsieve.ops_cache import proxy_scores
from attnsieve.ops_decode import select_threshold


@dataclass(frozen=True)
class Level:
    """Clusters of a prompt's keys, C in each KV head.

    Attributes:
        centroids: ``[B, Hkv, C, D]`` in the dtype of the queries.
        log_sizes: float32 ``[B, Hkv, C]``, logarithms of the numbers of keys.
        labels: int64 ``[B, Hkv, n]``, the cluster of each key.
    """

    centroids: Tensor
    log_sizes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Clusters:
    """What a prefill leaves of one layer.

    Attributes:
        fine: clusters of the first n keys. coarse: clusters of the fine ones, or None.
        parents: int64 ``[B, Hkv, C]``, the coarse cluster of each fine one, or None.
        observed: ``[B, Hq, w, D]``, the queries that thresholds are found with.
    """

    fine: Level
    observed: Tensor
    coarse: Level | None = None
    parents: Tensor | None = None


@dataclass(eq=False)
class Squeezed(DecodeMethod):
    """The keys of a fixed prompt whose clusters matter, and every key after them.

    A prefill clusters the keys of each KV head by direction, all but those of the last ``observed``
    tokens. A row's importance of cluster c is what its softmax over the clustered keys would give
    each member, were all members the centroid: ``exp(s q.C_c) / sum_c' N_c' exp(s q.C_c')``, with
    the numbers N of keys. Keys whose cluster's importance exceeds a threshold are attended to
    exactly, the others not (arXiv 2411.09688). There is one threshold for all layers and heads: the
    quantile ``percentile`` of the keys' importances in this prompt, each the mean over the observed
    queries.

    With ``coarse`` there are two levels: the centroids have clusters of their own, whose threshold
    is the quantile ``coarse_percentile``; fine clusters compete, and enter the sum, only where
    their coarse one passes.

    What differs from the authors' code: a new row's lists are its own (theirs: one for the mean
    importance of all rows of an input, which is the same for one row). K-means begins with evenly
    spaced keys instead of k-means++ and takes at most ``iterations`` turns (theirs 300), so it is
    the same in every run. Query heads of a group share a list, by the largest importance that one
    of them gives; models there had none. Thresholds are of this prompt; theirs too.

    The prompt is what one prefill from position 0 brings. Of pieces that follow, such as a question
    about it, every key is attended to. After a prompt of no more than ``observed`` tokens, and in
    layers without one, everything is. ``clusters`` holds what a prompt left by (sequence, layer)
    and is kept by :meth:`reset`. The first step finds the thresholds, of all layers together;
    ``state`` holds them by sequence, and by (sequence, layer) the position from which on everything
    is attended to: what stands in the place of tokens that were taken back is not clustered.

    Attributes:
        percentile: share of the clustered keys below the threshold, for the observed queries; 0
            attends to everything.
        share: clusters per key. coarse: the same of the first level; None for one level.
        observed: newest prompt tokens: not clustered, and those whose queries are observed.
        capacity: keys of a list at most, the best ones; None holds the whole prompt.
        list_heads: "q" one list per query head, or "kv" (default).
        score_scale: s; default ``1 / sqrt(D)``.
    """

    percentile: float = 0.9
    share: float = 0.05
    observed: int = 100
    coarse: float | None = None
    coarse_percentile: float = 0.7
    capacity: int | None = None
    list_heads: str = "kv"
    score_scale: float | None = None
    iterations: int = 20
    clusters: dict[tuple[int, int], Clusters] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("percentile", "coarse_percentile"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a share in [0, 1), got {getattr(self, name)}")
        for name in ("share", "coarse"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}: expected a share in (0, 1], got {value}")
        for name in ("observed", "capacity"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.list_heads not in ("q", "kv"):
            raise ValueError(f"list_heads: expected 'q' or 'kv', got {self.list_heads!r}")

    def prefill(self, q, k, *, layer_idx=0, sequence=0, begin=0) -> None:
        place = sequence, layer_idx
        known = self.clusters.get(place)
        if known is not None and begin >= known.fine.labels.shape[2]:
            return  # a piece after the clustered keys
        for stale in (sequence, place):
            self.state.pop(stale, None)
        self.clusters.pop(place, None)
        count = k.shape[2] - self.observed
        if begin > 0 or count < 1:
            return
        observed = q[:, :, -self.observed :].clone()
        keys = k[:, :, :count]
        centroids, labels, sizes = self._cluster(keys, self.share, count)
        fine, coarse, parents = _level(centroids, sizes, labels, q), None, None
        if self.coarse is not None:
            above, parents, _ = self._cluster(centroids, self.coarse, count)
            members = sizes.new_zeros(above.shape[:3]).scatter_add_(2, parents, sizes)
            coarse = _level(above, members, parents.gather(2, labels), q)
        self.clusters[place] = Clusters(fine, observed, coarse, parents)

    def _cluster(self, points: Tensor, share: float, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        number = min(max(1, int(share * keys)), points.shape[2])
        return kmeans(points, number, iterations=self.iterations)

    def __call__(
        self, q, cache, *, layer_idx=0, sequence=0, softmax_scale=None, sink=None
    ) -> Tensor:
        options = dict(softmax_scale=softmax_scale, sink=sink)
        place = sequence, layer_idx
        clusters = self.clusters.get(place)
        if clusters is None or self.percentile == 0:
            return attend(q, cache, None, **options)
        if sequence not in self.state:
            self.state[sequence] = self._thresholds(sequence)
        scores = self._scores(q, clusters, self.state[sequence])
        begin = self.state.get(place)
        if begin is None:
            begin = q.new_full(q.shape[:1], scores.shape[-1], dtype=torch.int32)
            self.state[place] = begin
        if cache.seq_lens is None:
            begin.clamp_(max=cache.k_cache.shape[2] - q.shape[2])
        else:
            torch.minimum(begin, cache.seq_lens - q.shape[2], out=begin)
        index, _ = select_threshold(
            scores if q.shape[2] > 1 else scores.squeeze(1),
            self.state[sequence][0],
            scores.shape[-1] if self.capacity is None else self.capacity,
            seq_lens=begin,
        )
        return attend(q, cache, index, dense_begin=begin, **options)

    def _thresholds(self, sequence: int) -> tuple[Tensor, Tensor | None]:
        """float32 ``[B]``, logarithms, of the fine and of the coarse level."""
        layers = [x for place, x in self.clusters.items() if place[0] == sequence]
        fine = [self._observed_importance(x.observed, x.fine) for x in layers]
        threshold = _quantile(torch.cat(fine, 1), self.percentile).log()
        if self.coarse is None:
            return threshold, None
        coarse = [self._observed_importance(x.observed, x.coarse) for x in layers]
        return threshold, _quantile(torch.cat(coarse, 1), self.coarse_percentile).log()

    def _observed_importance(self, observed: Tensor, level: Level) -> Tensor:
        """``[B, lists * n]`` of every key, mean over the observed queries."""
        importance = self._log_importance(observed, level).exp().mean(1, keepdim=True)
        return _of_keys(importance, level.labels).flatten(1)

    def _scores(
        self, q: Tensor, clusters: Clusters, thresholds: tuple[Tensor, Tensor | None]
    ) -> Tensor:
        """float32 ``[B, Sq, lists, n]``: logarithms of the keys' importances."""
        fine = clusters.fine
        if clusters.coarse is None:
            return _of_keys(self._log_importance(q, fine), fine.labels)
        passed = self._log_importance(q, clusters.coarse) > thresholds[1].view(-1, 1, 1, 1, 1)
        passed = _of_keys(passed, clusters.parents, flat=False)  # of the fine clusters
        importance = self._log_importance(q, fine, passed)
        return _of_keys(importance.masked_fill(~passed, -torch.inf), fine.labels)

    def _log_importance(self, q: Tensor, level: Level, among: Tensor | None = None) -> Tensor:
        """float32 ``[B, R, Hkv, G or 1, C]``, over the clusters of ``among`` alone if given."""
        logits = proxy_scores(q, level.centroids, score_scale=self.score_scale)
        logits = logits.unflatten(2, (level.centroids.shape[1], -1))
        weighted = logits + level.log_sizes[:, None, :, None]
        if among is not None:
            weighted = weighted.masked_fill(~among, -torch.inf)
        importance = logits - weighted.logsumexp(-1, keepdim=True)
        return importance if self.list_heads == "q" else importance.amax(3, keepdim=True)


def _level(centroids: Tensor, sizes: Tensor, labels: Tensor, q: Tensor) -> Level:
    return Level(centroids.to(q.dtype), sizes.float().log(), labels)


def _of_keys(values: Tensor, labels: Tensor, flat: bool = True) -> Tensor:
    """Values ``[B, R, Hkv, G, C]`` of the clusters that ``labels [B, Hkv, n]`` name.

    ``[B, R, Hkv * G, n]``, or ``[B, R, Hkv, G, n]``.
    """
    places = labels[:, None, :, None].expand(*values.shape[:4], -1)
    found = values.gather(4, places)
    return found.flatten(2, 3) if flat else found


def _quantile(values: Tensor, share: float) -> Tensor:
    """``[B]``: the largest of the lowest ``share`` of positive ``values [B, n]``; 0 of none."""
    if share == 0:
        return values.new_zeros(values.shape[:1])
    return values.sort(1).values[:, int(share * (values.shape[1] - 1))].clone()
