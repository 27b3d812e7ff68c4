"""The rules of topk_attention in float64, one head at a time; nothing of the library is used."""

from __future__ import annotations

import math

import torch

from layouts import deal_pages, fill_pages, page_bounds


def forced_units(length, page_size, sink_tokens, recent_tokens):
    """Tokens or pages of a row of ``length`` visible keys that the windows force."""
    units = -(-length // page_size)
    sink = -(-sink_tokens // page_size)
    recent = 0 if recent_tokens == 0 else 1 + -(-(recent_tokens - 1) // page_size)
    return [u for u in range(units) if u < sink or u >= units - recent]


def kept_keys(scores, length, k, page_size, sink_tokens, recent_tokens):
    """Positions that a row keeps: forced units, then the best by (score, smaller index)."""
    units = -(-length // page_size)
    forced = forced_units(length, page_size, sink_tokens, recent_tokens)
    others = sorted((u for u in range(units) if u not in forced), key=lambda u: (-scores[u], u))
    chosen = (forced + others)[: k // page_size]
    return [j for u in chosen for j in range(u * page_size, min((u + 1) * page_size, length))]


def unit_scores(rule, q, k, length, page_size):
    """Scores of one query row q [D] over keys k [T, D]; a row sees its first ``length``."""
    if len(k) == 0:
        return []
    dots = k[:length] @ q
    if rule == "exact":
        return [float(x.max()) for x in dots.split(page_size) if len(x)]
    pages = k.split(page_size)  # Quest's pages hold all T keys, a later row's too
    return [float(torch.maximum(q * p.amin(0), q * p.amax(0)).sum()) for p in pages]


def expected_lists(rule, q, k, lengths, num_lists, pick):
    """{(b, list, row): kept positions}, q [B, Hq, Sq, D], k [B, Hkv, S, D] in float64."""
    lists = {}
    num_heads, rows = q.shape[1], q.shape[2]
    for b, length in enumerate(lengths):
        for i in range(rows):
            visible = max(length - rows + 1 + i, 0) if pick["causal"] else length
            scores = [
                unit_scores(
                    rule,
                    q[b, h, i],
                    k[b, h // (num_heads // k.shape[1]), :length],
                    visible,
                    pick["page_size"],
                )
                for h in range(num_heads)
            ]
            for g in range(num_lists):
                heads = range(g * num_heads // num_lists, (g + 1) * num_heads // num_lists)
                best = [max(own) for own in zip(*(scores[h] for h in heads), strict=True)]
                options = [pick[n] for n in ("k", "page_size", "sink_tokens", "recent_tokens")]
                lists[b, g, i] = kept_keys(best, visible, *options)
    return lists


def seen_pairs(lists, batch, num_heads, rows, capacity):
    seen = torch.zeros(batch, num_heads, rows, capacity, dtype=torch.bool)
    num_lists = 1 + max(g for _, g, _ in lists)
    for (b, g, i), kept in lists.items():
        for h in range(g * num_heads // num_lists, (g + 1) * num_heads // num_lists):
            seen[b, h, i, kept] = True
    return seen


def paged(k, v, lengths, page_size, rule):
    """The same keys in shuffled pages, NaN where no key is, and page bounds where Quest is."""
    table = deal_pages(lengths, -(-k.shape[2] // page_size), page_size)
    caches = [fill_pages(x, lengths, table, page_size) for x in (k, v)]
    options = dict(block_table=table)
    if rule == "quest":
        options["bounds"] = torch.full((*caches[0].shape[:1], k.shape[1], 2, k.shape[3]), math.nan)
        options["bounds"] = options["bounds"].to(k.dtype)
        for b, length in enumerate(lengths):
            bounds = page_bounds(k[b : b + 1, :, :length], page_size)[0] if length else ()
            for slot, page in enumerate(bounds):
                options["bounds"][int(table[b, slot])] = page
    return caches, options


def expected_lse(q, k, seen, sink):
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT / 8
    scores = scores.masked_fill(~seen, -math.inf)
    if sink is not None:
        column = sink.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    return scores.logsumexp(-1)
