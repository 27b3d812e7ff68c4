"""Narrow projections of queries and keys whose products stand for logits.

LRQK (Li et al., NeurIPS 2025, arXiv:2510.23649) factorises all queries and keys of a prompt by
alternating least squares. Its iterates are ``Q X`` and ``K Y`` throughout, so the Gram matrices of
Q and K, head_dim x head_dim, are all that it needs to read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Rows whose Gram matrix is computed at once: float64 copies of 32 heads of 128 take 128 MB.
_CHUNK = 4096
# Rows that tensor cores add in float32, to 1e-6 of the diagonal; how many such sums are added in
# float32 once more; and how many are kept, 128 MB at head_dim 128.
_NARROW_ROWS, _NARROW_SUMS, _NARROW_CHUNKS = 512, 64, 2048
# Added to the diagonal of an r x r matrix, relative to its mean: singular ones stay solvable. The
# second to that of a Gram matrix of float32 sums, whose rounding could make it indefinite.
_RIDGE, _NARROW_RIDGE = 1e-10, 1e-5


@dataclass(frozen=True)
class LowRankFit:
    """Projections of H heads: a query's or a key's ``rank`` numbers, and what these stand for.

    H is Hkv where a group of query heads shares one, else Hq.

    Args:
        to_q, to_k: ``[B, H, D, r]``, float32 as fitted. ``(q @ to_q) . (k @ to_k)`` stands for
            ``q . k``.
        from_q, from_k: float32 ``[B, H, r, D]``: the least-squares reconstruction of q and k from
            their numbers.
    """

    to_q: Tensor
    to_k: Tensor
    from_q: Tensor
    from_k: Tensor

    def queries(self, q: Tensor) -> Tensor:
        """``[B, Hq, S, D]`` to ``[B, Hq, S, r]``, in q's dtype."""
        batch, heads, rows, width = q.shape
        # The query heads that share a fit are rows of one product.
        grouped = q.reshape(batch, self.to_q.shape[1], -1, width) @ self.to_q.to(q.dtype)
        return grouped.view(batch, heads, rows, -1)

    def keys(self, k: Tensor) -> Tensor:
        """``[B, Hkv, S, D]`` to ``[B, H, S, r]``, in k's dtype: what a proxy cache holds."""
        heads = self.to_k.shape[1]
        return of_heads(k, heads) @ self.to_k.to(k.dtype)

    def projecting(self, dtype: torch.dtype) -> LowRankFit:
        """The same with ``to_q`` and ``to_k`` in the dtype that they are used in."""
        return replace(self, to_q=self.to_q.to(dtype), to_k=self.to_k.to(dtype))


def lowrank_fit(
    q: Tensor,
    k: Tensor,
    rank: int,
    *,
    share: str = "kv_head",
    method: str = "lrqk",
    start: str = "columns",
    iterations: int = 2,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> LowRankFit:
    """Fits :class:`LowRankFit` to the queries and keys of a prompt.

    Args:
        q: ``[B, Hq, Sq, D]``; k: ``[B, Hkv, Sk, D]``, after RoPE. Any floating dtype; everything is
            computed in float64, but for 16-bit inputs on a GPU: their products are added in float32
            over 32768 rows (to 1e-6 of a Gram matrix's diagonal, which gains 1e-5).
        rank: r, from 1 to D.
        share: ``"kv_head"``, one fit for the query heads of a group, to the mean of their Gram
            matrices: a key then has r numbers; ``"query_head"``, as published: r for each of them.
        method: ``"lrqk"``, or ``"pca"``: the leading principal directions of the keys for both.
        start: of LRQK, ``"columns"``: the r columns with the largest absolute sum over q and k; or
            ``"gaussian"``.
        iterations: of LRQK, at most.
        tolerance: LRQK ends when the mean square by which numbers of q and of k change is below
            this in every head. Read on the host after each iteration; None reads nothing.
        generator: of ``start="gaussian"``.

    Returns:
        The fit, on q's device. Rank-deficient, constant or zero rows give finite projections (a
        head of zeros gives zeros); rows that are not finite give projections of their head that
        are not.

    Raises:
        ValueError: a shape, dtype or option that is none of the above.
    """
    _check(q, k, rank, share, method, start, iterations)
    group = q.shape[1] // k.shape[1]
    gram_q, gram_k = _gram(q), _gram(k)
    weight_q, weight_k = _column_weights(q), _column_weights(k)
    if share == "kv_head":
        gram_q = gram_q.unflatten(1, (-1, group)).mean(2)
        weight_q = weight_q.unflatten(1, (-1, group)).mean(2)
    else:
        gram_k, weight_k = (x.repeat_interleave(group, 1) for x in (gram_k, weight_k))
    if method == "pca":
        basis = _leading_directions(gram_k, rank)
        return _fit_of(gram_q, gram_k, basis, basis)

    if start == "columns":
        best = (weight_q + weight_k).topk(rank, dim=2).indices
        x = y = torch.nn.functional.one_hot(best, q.shape[3]).transpose(2, 3).double()
    else:
        shape = (*gram_k.shape[:2], q.shape[3], rank)
        options = dict(generator=generator, dtype=torch.float64, device=q.device)
        x, y = torch.randn(shape, **options), torch.randn(shape, **options)
    for _ in range(iterations):
        from_q, from_k = _reconstruction(gram_q, x), _reconstruction(gram_k, y)
        new_x = _alternate(gram_k, y, from_q)
        new_y = _alternate(gram_q, new_x, from_k)
        change = (new_x - x, new_y - y)
        x, y = new_x, new_y
        if tolerance is not None and all(
            bool((_mean_square(gram, step, rows.shape[2]) < tolerance).all())
            for gram, step, rows in zip((gram_q, gram_k), change, (q, k), strict=True)
        ):
            break
    return _fit_of(gram_q, gram_k, x, y)


def lowrank_step(
    fit: LowRankFit,
    q: Tensor,
    k: Tensor,
    resident_keys: Tensor,
    resident_proxies: Tensor,
    *,
    iterations: int = 2,
) -> tuple[LowRankFit, Tensor, Tensor]:
    """LRQK's refinement at a decode step: the new rows' numbers, and reconstructions with them.

    In turns, the query's numbers fit its reconstruction, its logits with the resident keys and with
    its own key; the key's fit its reconstruction and that logit. Then ``from_q`` and ``from_k``
    change by the least that reconstructs the new rows exactly (a Kaczmarz step).

    Args:
        fit: of the H heads.
        q: ``[B, Hq, 1, D]``; k: ``[B, Hkv, 1, D]``, the new token's.
        resident_keys: ``[B, H, n, D]``, the keys at hand, such as those attended to at the last
            step, and resident_proxies ``[B, H, n, r]``, their numbers. Rows of zeros stand for
            none.
        iterations: turns.

    Returns:
        The fit with new reconstructions, ``[B, Hq, 1, r]`` of the query and ``[B, H, 1, r]`` of the
        key, which belongs into the proxy cache, in q's dtype. Query heads that share a fit are
        refined one by one and weigh on their key as their mean.

    Raises:
        ValueError: a shape that does not fit.
    """
    heads, group = fit.to_k.shape[1], q.shape[1] // fit.to_k.shape[1]
    batch, width, rank = fit.to_k.shape[0], fit.to_k.shape[2], fit.to_k.shape[3]
    count = resident_keys.shape[2] if resident_keys.dim() == 4 else 0
    if k.dim() != 4 or k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(
            f"lowrank_step: k: expected heads that divide {heads}, got shape {list(k.shape)}"
        )
    for name, tensor, shape in (
        ("q", q, (batch, heads * group, 1, width)),
        ("resident_keys", resident_keys, (batch, heads, count, width)),
        ("resident_proxies", resident_proxies, (batch, heads, count, rank)),
        ("k", k, (batch, k.shape[1], 1, width)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"lowrank_step: {name}: expected {list(shape)}, got {list(tensor.shape)}"
            )
    rows = q.double().flatten(2).unflatten(1, (heads, group))  # [B, H, G, D]
    key, near, numbers = (x.double() for x in (of_heads(k, heads), resident_keys, resident_proxies))
    from_q, from_k = fit.from_q.double(), fit.from_k.double()
    of_key = key @ from_k.transpose(2, 3)
    of_rows = rows @ from_q.transpose(2, 3) + rows @ near.transpose(2, 3) @ numbers
    key_moments = from_k @ from_k.transpose(2, 3)
    row_moments = from_q @ from_q.transpose(2, 3) + numbers.transpose(2, 3) @ numbers
    logits = rows @ key.transpose(2, 3)  # [B, H, G, 1]
    key_numbers = _solve(key_moments, of_key.transpose(2, 3)).transpose(2, 3)
    row_numbers = torch.zeros_like(of_rows)
    for _ in range(iterations):
        matrix = row_moments + key_numbers.transpose(2, 3) * key_numbers
        right = of_rows + logits * key_numbers
        row_numbers = _solve(matrix, right.transpose(2, 3)).transpose(2, 3)
        matrix = key_moments + row_numbers.transpose(2, 3) @ row_numbers / group
        right = of_key + logits.transpose(2, 3) @ row_numbers / group
        key_numbers = _solve(matrix, right.transpose(2, 3)).transpose(2, 3)
    refined = LowRankFit(
        fit.to_q,
        fit.to_k,
        _reconstructing(from_q, row_numbers, rows).to(fit.from_q.dtype),
        _reconstructing(from_k, key_numbers, key).to(fit.from_k.dtype),
    )
    return refined, row_numbers.flatten(1, 2).unsqueeze(2).to(q.dtype), key_numbers.to(q.dtype)


def _reconstructing(reconstruction: Tensor, numbers: Tensor, rows: Tensor) -> Tensor:
    """The nearest to ``reconstruction`` that makes ``rows`` of their numbers."""
    missing = rows - numbers @ reconstruction
    step = _solve(numbers @ numbers.transpose(2, 3), missing)
    return reconstruction + numbers.transpose(2, 3) @ step


def _check(q, k, rank, share, method, start, iterations) -> None:
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dim() != 4 or not tensor.is_floating_point():
            raise ValueError(f"lowrank_fit: {name}: expected floating [B, H, S, D]")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError("lowrank_fit: k: batch and head_dim must be q's")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError("lowrank_fit: k: its heads must divide q's")
    if not 1 <= rank <= q.shape[3]:
        raise ValueError(f"lowrank_fit: rank: expected 1 to {q.shape[3]}, got {rank}")
    for name, given, known in (
        ("share", share, ("kv_head", "query_head")),
        ("method", method, ("lrqk", "pca")),
        ("start", start, ("columns", "gaussian")),
    ):
        if given not in known:
            raise ValueError(f"lowrank_fit: {name}: expected one of {known}, got {given!r}")
    if iterations < 0:
        raise ValueError(f"lowrank_fit: iterations: must not be negative, got {iterations}")


def of_heads(x: Tensor, heads: int) -> Tensor:
    """Dim 1 of ``x`` repeated to ``heads``: consecutive ones are equal."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _gram(x: Tensor) -> Tensor:
    """``X^T X`` of ``[B, H, S, D]``, float64."""
    total = x.new_zeros((*x.shape[:2], x.shape[3], x.shape[3]), dtype=torch.float64)
    if _is_narrow(x):
        whole = x.shape[2] // _NARROW_ROWS * _NARROW_ROWS
        for rows, sums in _runs_of_heads(x[:, :, :whole], total):
            chunks = rows.unflatten(1, (-1, _NARROW_ROWS))
            blocks = chunks.flatten(0, 1)
            products = torch.bmm(blocks.mT, blocks, out_dtype=torch.float32)
            for part in products.unflatten(0, chunks.shape[:2]).split(_NARROW_SUMS, 1):
                sums += part.sum(1)
        diagonal = total.diagonal(dim1=2, dim2=3)
        diagonal += _NARROW_RIDGE * diagonal.mean(2, keepdim=True)
        x = x[:, :, whole:]
    for part in x.split(_CHUNK, 2):
        part = part.double()
        total += part.transpose(2, 3) @ part
    return total


def _runs_of_heads(x: Tensor, total: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows [h, n, D] of heads of ``x``, views of it, and these heads of ``total``."""
    longest = _NARROW_ROWS * _NARROW_CHUNKS
    at_once = max(1, longest // max(1, x.shape[2]))
    whole = (
        [(x.flatten(0, 1), total.flatten(0, 1))]
        if x.is_contiguous()
        else zip(x, total, strict=True)
    )
    for heads, sums in whole:
        for part, sums_of_part in zip(heads.split(at_once), sums.split(at_once), strict=True):
            for rows in part.split(longest, 1):
                yield rows, sums_of_part


def _is_narrow(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def _column_weights(x: Tensor) -> Tensor:
    if _is_narrow(x):
        return torch.linalg.vector_norm(x, 1, 2, dtype=torch.float32).double()
    return sum(
        (torch.linalg.vector_norm(part, 1, 2, dtype=torch.float64) for part in x.split(_CHUNK, 2)),
        start=x.new_zeros((*x.shape[:2], x.shape[3]), dtype=torch.float64),
    )


def _leading_directions(gram: Tensor, rank: int) -> Tensor:
    # The eigenvalue routines refuse NaN, of one head for all.
    finite = gram.isfinite().all(3, keepdim=True).all(2, keepdim=True)
    vectors = torch.linalg.eigh(gram.where(finite, torch.zeros_like(gram))).eigenvectors
    return vectors[..., -rank:].flip(3).where(finite, torch.full_like(gram[..., :1], torch.nan))


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix^-1 @ right`` of symmetric matrices without negative eigenvalues."""
    diagonal = matrix.diagonal(dim1=2, dim2=3)
    ridge = diagonal.mean(2, keepdim=True) * _RIDGE
    # A matrix of zeros has zeros on the right too: any multiple of 1 does.
    ridge = torch.where(ridge == 0, torch.ones_like(ridge), ridge)
    factor = torch.linalg.cholesky_ex(matrix + torch.diag_embed(ridge.expand_as(diagonal))).L
    return torch.cholesky_solve(right, factor)


def _reconstruction(gram: Tensor, x: Tensor) -> Tensor:
    """B ``[r, D]`` of the least squares ``Q X B = Q``."""
    moments = x.transpose(2, 3) @ gram
    return _solve(moments @ x, moments)


def _alternate(other_gram: Tensor, other: Tensor, reconstruction: Tensor) -> Tensor:
    """One side's projection that fits the logits and its reconstruction, given the other side."""
    moments = other_gram @ other
    right = moments + reconstruction.transpose(2, 3)
    matrix = other.transpose(2, 3) @ moments + reconstruction @ reconstruction.transpose(2, 3)
    return _solve(matrix, right.transpose(2, 3)).transpose(2, 3)


def _mean_square(gram: Tensor, step: Tensor, rows: int) -> Tensor:
    return (step * (gram @ step)).sum((2, 3)) / max(rows * step.shape[3], 1)


def _fit_of(gram_q: Tensor, gram_k: Tensor, x: Tensor, y: Tensor) -> LowRankFit:
    parts = (x, y, _reconstruction(gram_q, x), _reconstruction(gram_k, y))
    return LowRankFit(*(part.float().contiguous() for part in parts))
