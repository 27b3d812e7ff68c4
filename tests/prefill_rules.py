"""The selection rules of prefill methods' papers, written out in float64 for one sequence.

q is ``[Hq, Sq, D]``, k ``[Hkv, Sk, D]``; scale is 1 / sqrt(D). A rule returns, per head and row of
blocks, the set of kept blocks, and whether another set is within ``MARGIN`` of the rule.
"""

from __future__ import annotations

import math

import torch

MARGIN = 1e-5


def sees(row, key, offset, causal):
    return not causal or key <= row + offset


def visible_blocks(first, block_q, block_k, seqlens, causal):
    """Blocks that hold a key which one of the block_q rows from ``first`` on sees."""
    last_row = min(first + block_q, seqlens[0]) - 1
    offset = seqlens[1] - seqlens[0]
    keys = range(0, seqlens[1], block_k)
    return [j // block_k for j in keys if sees(last_row, j, offset, causal)]


def diagonal_blocks(first, block_q, block_k, seqlens):
    offset = seqlens[1] - seqlens[0]
    last = min(first + block_q, seqlens[0]) - 1
    keys = range(max(first + offset, 0), min(last + offset, seqlens[1] - 1) + 1)
    return {j // block_k for j in keys}


def fewest(weights, forced, share):
    """The shortest prefix, forced ones first and then descending, whose sum reaches the share."""
    order = sorted(weights, key=lambda b: (b not in forced, -weights[b], b))
    total, reached, kept, close = sum(weights.values()), 0.0, set(), False
    for block in order:
        if reached >= share * total and forced <= kept:
            break
        kept.add(block)
        reached += weights[block]
        close |= abs(reached - share * total) < MARGIN * total
    return kept, close


def antidiagonal_mass(q, k, stride, causal):
    """[Hq, ceil(Sq / stride), ceil(Sk / stride)]: weights of squares of rows and keys."""
    (heads, rows, dim), (kv_heads, keys) = q.shape, k.shape[:2]
    mass = q.new_zeros(heads, -(-rows // stride), -(-keys // stride))
    for h in range(heads):
        products = q[h] @ k[h // (heads // kv_heads)].T / math.sqrt(dim) / stride
        for a in range(mass.shape[1]):
            logits = {}
            for b in range(mass.shape[2]):
                # Rows past the end stand for zeros, and have their place under the mask.
                if sees(a * stride + stride - 1, b * stride, keys - rows, causal):
                    square = products[a * stride :, b * stride :][:stride, :stride]
                    real = [(t, stride - 1 - t) for t in range(stride)]
                    real = [(t, u) for t, u in real if t < square.shape[0] and u < square.shape[1]]
                    logits[b] = sum(float(square[pair]) for pair in real)
            if logits:
                top = max(logits.values())
                norm = sum(math.exp(x - top) for x in logits.values())
                for b, x in logits.items():
                    mass[h, a, b] = math.exp(x - top) / norm
    return mass


def xattention(q, k, tau, stride, block_q, block_k, causal):
    seqlens = (q.shape[1], k.shape[1])
    squares = antidiagonal_mass(q, k, stride, causal)
    kept = []
    for h in range(q.shape[0]):
        for first in range(0, seqlens[0], block_q):
            visible = visible_blocks(first, block_q, block_k, seqlens, causal)
            rows = squares[h, first // stride : (first + block_q) // stride]
            weights = {
                b: float(rows[:, b * block_k // stride : (b + 1) * block_k // stride].sum())
                for b in visible
            }
            forced = {0} | diagonal_blocks(first, block_q, block_k, seqlens)
            kept.append(fewest(weights, forced & set(visible), tau))
    return kept


def cosine(x):
    """Mean cosine over all pairs of rows; a zero row has none with any."""
    unit = torch.stack([row / row.norm() if row.norm() > 0 else row for row in x])
    return float((unit @ unit.T).mean())


def spargeattn(q, k, similarity, cdf, topk, sink, block_q, block_k, causal):
    (heads, rows, dim), (kv_heads, keys) = q.shape, k.shape[:2]
    kept = []
    for h in range(heads):
        own = k[h // (heads // kv_heads)]
        smooth = (own - own.mean(0)).split(block_k)
        alike = [cosine(x) for x in smooth]
        for first in range(0, rows, block_q):
            part = q[h, first : first + block_q]
            visible = visible_blocks(first, block_q, block_k, (rows, keys), causal)
            told = [b for b in visible if alike[b] > similarity]
            logits = {b: float(part.mean(0) @ smooth[b].mean(0)) / math.sqrt(dim) for b in told}
            top = max(logits.values(), default=0.0)
            weights = {b: math.exp(logits[b] - top) if b in logits else 0.0 for b in visible}
            forced = diagonal_blocks(first, block_q, block_k, (rows, keys)) | (
                {0} if sink else set()
            )
            forced &= set(visible)
            if cdf is not None:
                chosen, close = fewest(weights, forced, cdf)
            else:
                order = sorted(visible, key=lambda b: (b not in forced, -weights[b], b))
                chosen, close = set(order[: max(1, int(topk * -(-keys // block_k)))]), False
                chosen |= forced
            chosen |= set(visible) - set(told)
            if cosine(part) <= similarity:
                chosen = set(visible)
            near = [abs(x - similarity) < MARGIN for x in (*alike, cosine(part))]
            kept.append((chosen, close or any(near)))
    return kept
