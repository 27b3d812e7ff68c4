"""The rules of the decode methods' papers, for one sequence and one new row, in plain torch.

Arguments are q ``[Hq, D]`` and k ``[Hkv, T, D]``, best in float64; a rule returns a set of kept
positions per query head. Softmaxes scale by 1/8, so D is 64.
"""

from __future__ import annotations

import torch

INDEX_DIM = 16


def logits(q, k):
    """[Hq, T], unscaled; query head h reads KV head h // G."""
    group = q.shape[0] // k.shape[0]
    return torch.stack([k[h // group] @ q[h] for h in range(q.shape[0])])


def best(scores, count):
    """Positions of the ``count`` largest, the smaller position first where they are equal."""
    return set(sorted(range(len(scores)), key=lambda j: (-float(scores[j]), j))[:count])


def tokens_of(pages, page_size, length):
    return {j for u in pages for j in range(u * page_size, min((u + 1) * page_size, length))}


def quest(q, k, budget, page_size):
    length, kept = k.shape[1], []
    for h in range(q.shape[0]):
        pages = k[h // (q.shape[0] // k.shape[0])].split(page_size)
        bound = [float(torch.maximum(q[h] * p.amax(0), q[h] * p.amin(0)).sum()) for p in pages]
        chosen = best(bound[:-1], budget // page_size - 1) | {len(pages) - 1}
        kept.append(tokens_of(chosen, page_size, length))
    return kept


def tidaldecode(q, k, budget):
    return [best(row[:-1], budget) | {k.shape[1] - 1} for row in logits(q, k)]


def delta(q, k, budget, page_size, recent):
    length = k.shape[1]
    token = torch.softmax(logits(q, k) / 8, -1).amax(0)
    mass = [float(x.sum()) for x in token.split(page_size)]
    last = set(range(max(len(mass) - recent, 0), len(mass)))
    others = [m if u not in last else -1.0 for u, m in enumerate(mass)]
    chosen = last | best(others, max(budget // page_size - len(last), 0))
    return [tokens_of(chosen, page_size, length)] * q.shape[0]


def recycled(q, k, budget):
    weights, group = torch.softmax(logits(q, k) / 8, -1), q.shape[0] // k.shape[0]
    return [best(weights[h // group * group :][:group].sum(0), budget) for h in range(q.shape[0])]


def lowrank(q, k, to_q, to_k, budget, recent):
    """One list per KV head; ``to_q``, ``to_k`` are ``[H, D, r]``, H heads for Hq or for Hkv."""
    length, group, kept = k.shape[1], q.shape[0] // k.shape[0], []
    scores = []
    for h in range(q.shape[0]):
        own = h * to_q.shape[0] // q.shape[0]
        scores.append((k[h // group] @ to_k[own]) @ (q[h] @ to_q[own]))
    newest = set(range(length - recent, length))
    for h in range(q.shape[0]):
        votes = torch.stack(scores[h // group * group :][:group]).amax(0)
        votes[length - recent :] = -torch.inf
        kept.append(newest | best(votes, budget - recent))
    return kept


def pair_dims(pair, head_dim, interleaved):
    return (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + head_dim // 2)


def pair_logits(q, k, pair, interleaved):
    """[Hq, T]: what one pair of dims adds to the logits."""
    dims = list(pair_dims(pair, q.shape[1], interleaved))
    return logits(q[:, dims], k[:, :, dims])


def fasa_hits(q, k, topk, rows, interleaved=False):
    """([Hq, D/2], of how many) of rows q [Hq, S, D] over k [Hkv, T, D], the last ``rows`` of S."""
    num_heads, count, head_dim = q.shape
    length, rows = k.shape[1], min(rows, count)
    topk = max(1, min(topk, (length - rows + 1) // 4))
    hits = torch.zeros(num_heads, head_dim // 2, dtype=torch.int64)
    for i in range(count - rows, count):
        seen = k[:, : length - count + i + 1]
        whole = [best(row, topk) for row in logits(q[:, i], seen)]
        for pair in range(head_dim // 2):
            for h, row in enumerate(pair_logits(q[:, i], seen, pair, interleaved)):
                hits[h, pair] += len(whole[h] & best(row, topk))
    return hits, topk * rows


def fasa(q, k, pairs, budget, recent, interleaved=False):
    """One list per KV head; ``pairs`` are lists, of Hkv or of Hq heads."""
    length, group, kept = k.shape[1], q.shape[0] // k.shape[0], []
    scores = []
    for h in range(q.shape[0]):
        own = pairs[h * len(pairs) // q.shape[0]]
        parts = [pair_logits(q, k, pair, interleaved)[h] for pair in own]
        scores.append(torch.stack(parts).sum(0))
    newest = set(range(length - recent, length))
    for h in range(q.shape[0]):
        votes = torch.stack(scores[h // group * group :][:group]).amax(0)
        votes[length - recent :] = -torch.inf
        kept.append(newest | best(votes, budget - recent))
    return kept


def importance(q, k, labels, among=None):
    """[Hq, C] of the clusters ``labels [Hkv, n]`` of k [Hkv, n, D]; 0 outside of ``among``.

    What a softmax over k gives to each member of a cluster, were all its members their mean.
    """
    group, count = q.shape[0] // k.shape[0], int(labels.max()) + 1
    weights = torch.zeros(q.shape[0], count, dtype=torch.float64)
    for h in range(q.shape[0]):
        members = [k[h // group][labels[h // group] == c] for c in range(count)]
        for c, keys in enumerate(members):
            if len(keys) and (among is None or bool(among[h, c])):
                weights[h, c] = torch.exp(q[h] @ keys.mean(0) / 8)
        total = sum(len(keys) * w for keys, w in zip(members, weights[h], strict=True))
        weights[h] /= total if total > 0 else 1.0
    return weights


def of_lists(values, num_lists):
    """[lists, ...]: the largest over the query heads of a list."""
    return values.unflatten(0, (num_lists, -1)).amax(1)


def of_keys(values, labels):
    """[lists, n] of [lists, C] and the clusters ``labels [Hkv, n]`` of the keys."""
    group = values.shape[0] // labels.shape[0]
    return torch.stack([x[labels[g // group]] for g, x in enumerate(values)])


def quantile(values, share):
    """The value that the share of the others is not above, without interpolation."""
    return float(values.flatten().sort().values[int(share * (values.numel() - 1))])


def observed_importance(queries, k, labels, num_lists):
    """[lists, n]: mean over ``queries [Hq, w, D]``."""
    rows = (of_lists(importance(q, k, labels), num_lists) for q in queries.unbind(1))
    return of_keys(torch.stack([*rows]).mean(0), labels)


def squeezed(q, k, labels, threshold, num_lists, coarse=None):
    """Keys of the n of ``labels [Hkv, n]`` above the threshold, and all after them.

    ``coarse`` is (labels of the coarse clusters, their centroids and sizes, their threshold).
    """
    count = labels.shape[1]
    kept, among = torch.ones(num_lists, count, dtype=torch.bool), None
    if coarse is not None:
        above, centroids, sizes, limit = coarse
        group = q.shape[0] // k.shape[0]
        weights = torch.stack(
            [torch.exp(centroids[h // group] @ row / 8) for h, row in enumerate(q)]
        )
        weights /= (weights * sizes.repeat_interleave(group, 0)).sum(1, keepdim=True)
        kept = of_keys(of_lists(weights, num_lists), above) > limit
        among = torch.zeros(q.shape[0], int(labels.max()) + 1, dtype=torch.bool)
        for h in range(q.shape[0]):
            own = labels[h // group], kept[h * num_lists // q.shape[0]]
            among[h, own[0][own[1]]] = True
    fine = of_lists(importance(q, k[:, :count], labels, among), num_lists)
    kept &= of_keys(fine, labels) > threshold
    newer = set(range(count, k.shape[1]))
    lists = [newer | set(row.nonzero().flatten().tolist()) for row in kept]
    return [lists[h * num_lists // q.shape[0]] for h in range(q.shape[0])]


def unturned(x, positions, inv_freq, interleaved=False):
    """complex [..., D/2]: the pairs of rows [..., T, D] before RoPE."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    angles = positions[:, None] * inv_freq
    real = first * angles.cos() + second * angles.sin()
    return torch.complex(real, second * angles.cos() - first * angles.sin())


def triattention_scores(q, k, at, inv_freq, aggregate, interleaved=False):
    """[Hq, T] of keys k [Hkv, T, D] for queries like q [Hq, S, D] that come from ``at`` on."""
    positions = torch.arange(max(q.shape[1], k.shape[1]), dtype=torch.float64)
    queries = unturned(q, positions[: q.shape[1]], inv_freq, interleaved)
    keys = unturned(k, positions[: k.shape[1]], inv_freq, interleaved)
    keys = keys.repeat_interleave(q.shape[0] // k.shape[0], 0)
    centre, norm = queries.mean(1, keepdim=True), queries.abs().mean(1, keepdim=True)
    scores = []
    for offset in [2**i for i in range(17)]:
        distance = at - positions[: k.shape[1], None] + offset
        phase = inv_freq * distance + (centre * keys.conj()).angle()
        scores.append((centre.abs() * keys.abs() * phase.cos()).sum(2))
    scores = torch.stack(scores)
    scores = scores.mean(0) if aggregate == "mean" else scores.amax(0)
    return scores + ((norm - centre.abs()) * keys.abs()).sum(2)


def triattention(scores, num_lists, budget, first, recent, normalize):
    """Per query head, of ``scores [Hq, T]``: the first, the recent ones and the best of the others.

    With ``normalize`` the others' scores have mean 0 and deviation 1 in each query head.
    """
    end = scores.shape[1] - recent
    middle = scores[:, first:end]
    if normalize:
        middle = middle - middle.mean(1, keepdim=True)
        middle = middle / middle.square().mean(1, keepdim=True).sqrt()
    forced = {*range(first), *range(end, scores.shape[1])}
    lists = [
        forced | {first + j for j in best(x, budget - len(forced))}
        for x in of_lists(middle, num_lists)
    ]
    return [lists[h * num_lists // len(scores)] for h in range(len(scores))]


def tokenselect(q, k, budget, init, local, scale):
    length = k.shape[1]
    middle = range(min(init, length), max(length - local, init))
    chosen = set(range(length)) - set(middle)
    if middle:
        votes = torch.softmax(scale * logits(q, k)[:, middle.start : middle.stop], -1).sum(0)
        chosen |= {middle.start + j for j in best(votes, budget)}
    return [chosen] * q.shape[0]


def index_inputs(layer_idx, q, cache):
    """A stand-in for a trained indexer: 3 heads, keys and weights that the inputs determine."""
    keys = cache.k_cache[..., :INDEX_DIM]
    keys = keys[:, :1] if cache.block_table is None else keys[:, :, :1]
    return dict(
        q=q[:, :3, :, INDEX_DIM : 2 * INDEX_DIM], keys=keys, head_weights=q[:, :3, :, 40].float()
    )


def dsa(q, k, budget):
    small, keys, weights = q[:3, INDEX_DIM : 2 * INDEX_DIM], k[0, :, :INDEX_DIM], q[:3, 40]
    return [best(weights @ (small @ keys.T).relu(), budget)] * q.shape[0]
