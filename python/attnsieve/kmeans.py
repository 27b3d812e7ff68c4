"""K-means clusters of keys, batched over heads and the same on every run."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kmeans"]

# Products of points and centres that are held at once: 256 MB in float32.
_CHUNK = 1 << 26


def kmeans(points: Tensor, clusters: int, *, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters by direction, with centroids of the points as they are.

    Lloyd's iterations over points of length one (Euclidean), from centres that are evenly spaced
    points of the input; they end early where no point changes its cluster, which is read on the
    host. Of equally near centres the first counts, and one that loses all its points stays where
    it is. Sums are taken in one order: nothing random, nothing that varies from run to run.

    Args:
        points: ``[B, H, n, D]``, floating; each head has clusters of its own.
        clusters: C, from 1 to n.
        iterations: at most so many, at least 1.

    Returns:
        ``(centroids, labels, sizes)``: float32 ``[B, H, C, D]``, the mean of a cluster's points
        (zeros where it has none), int64 ``[B, H, n]`` and int64 ``[B, H, C]``.

    Raises:
        ValueError: clusters or iterations out of range.
    """
    count = points.shape[2]
    if not 1 <= clusters <= count:
        raise ValueError(f"clusters: expected 1 to {count}, got {clusters}")
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")
    points = points.float()
    directions = torch.nn.functional.normalize(points, dim=-1)
    first = torch.arange(clusters, device=points.device) * count // clusters
    centres, labels = directions[:, :, first], None
    for _ in range(iterations):
        nearest = _nearest(directions, centres)
        if labels is not None and torch.equal(nearest, labels):
            break
        labels = nearest
        means, sizes = _means(directions, labels, clusters)
        centres = torch.where(sizes.unsqueeze(-1) > 0, means, centres)
    centroids, sizes = _means(points, labels, clusters)
    return centroids, labels, sizes


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """int64 ``[B, H, n]``: points are of length one, so the squared distance needs no norm."""
    halves = centres.square().sum(-1).unsqueeze(2) / 2
    rows = max(1, _CHUNK // max(1, centres.shape[:3].numel()))
    parts = (part @ centres.mT - halves for part in points.split(rows, 2))
    return torch.cat([part.argmax(-1) for part in parts], 2)


def _means(points: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """``[B, H, C, D]`` means in the order of the points, and sizes ``[B, H, C]``."""
    heads = points.shape[0] * points.shape[1]
    of_head = torch.arange(heads, device=points.device).view(*points.shape[:2], 1) * clusters
    segments = (labels + of_head).flatten()
    order = segments.argsort(stable=True)
    sizes = torch.bincount(segments, minlength=heads * clusters)
    sums = torch.segment_reduce(
        points.flatten(0, 2)[order], "sum", lengths=sizes, axis=0, initial=0.0, unsafe=True
    )
    shape = *points.shape[:2], clusters
    means = sums / sizes.clamp(min=1).unsqueeze(-1)
    return means.view(*shape, -1), sizes.view(shape)
