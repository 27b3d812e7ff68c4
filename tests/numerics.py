"""The tolerance rule: error against float64 at most twice that of PyTorch at the same dtype."""

from __future__ import annotations

import torch

from attnsieve import reference
from cases import Problem
from layouts import sequences_of

BITWISE = dict(rtol=0, atol=0, equal_nan=True)


def assert_bitwise(actual, expected, what: str = "") -> None:
    """Equal bit for bit; NaN equals NaN. Takes tensors or tuples of them."""
    torch.testing.assert_close(actual, expected, msg=lambda m: f"{what}: {m}", **BITWISE)


def oracle_times(problem: Problem) -> torch.Tensor:
    """int64 ``[B, Hq, Sq, Sk]``: how often each pair is attended, masks included."""
    batch, num_heads, seqlen_q, _ = problem.q.shape
    seqlen_k = problem.k.shape[2]
    times = reference.index_multiplicity(problem.index, batch, num_heads, seqlen_q, seqlen_k)
    masks = {name: problem.options.get(name) for name in ("causal", "window")}
    return times.to(problem.q.device) * reference.visible_mask(
        seqlen_q, seqlen_k, device=problem.q.device, **masks
    )


def _eager(q, k, v, seen, scale, sink):
    """Attention as one writes it in PyTorch, in the dtype of its inputs."""
    scores = ((q * scale) @ k.transpose(-1, -2)).masked_fill(~seen, -torch.inf)
    if sink is not None:
        column = sink.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.softmax(scores, dim=-1).masked_fill((lse == -torch.inf).unsqueeze(-1), 0)
    return weights[..., : k.shape[2]] @ v, lse


def pytorch_same_dtype(q, k, v, times, *, softmax_scale=None, sink=None):
    """Eager PyTorch with the same mask: ``out`` in the inputs' dtype, ``lse`` in float32.

    A kernel keeps lse in float32 whatever its inputs are, so lse is compared with float32 PyTorch.
    """
    group_size = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group_size, dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    assert times.numel() == 0 or times.max() <= 1, "eager attention cannot repeat a key"
    out, _ = _eager(q, k, v, times > 0, scale, sink)
    _, lse = _eager(q.float(), k.float(), v.float(), times > 0, scale, sink)
    return out, lse


def rounding_noise(ref: torch.Tensor, dtype: torch.dtype) -> float:
    """What one addition and subtraction of 0.3 costs in the output's own type."""
    ref = ref.to(dtype)
    return float((ref + 0.3 - 0.3 - ref).abs().max()) if ref.numel() else 0.0


def _classes(x: torch.Tensor) -> torch.Tensor:
    """0 finite, 1 +inf, 2 -inf, 3 NaN."""
    return (x == torch.inf) * 1 + (x == -torch.inf) * 2 + x.isnan() * 3


def _report(name: str, error: torch.Tensor, bound: float, seed_text: str) -> str:
    worst = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    rows = error.amax(-1) if error.dim() > 3 else error
    histogram = torch.histc(rows.float().clamp(max=4 * bound), bins=8, min=0, max=4 * bound)
    return (
        f"{name}: error {float(error.max()):.3e} at {worst} is above the bound {bound:.3e}\n"
        f"rows by error in eighths of 4 bounds: {[int(n) for n in histogram]}\n{seed_text}"
    )


def assert_near_eager(name, actual, expected, eager, floor: float, what: str = "") -> None:
    """The rule for one tensor: ``expected`` is float64, ``eager`` PyTorch's at the same dtype."""
    actual, eager = actual.double(), eager.double()
    same = _classes(actual) == _classes(expected)
    if not same.all():
        where = torch.nonzero(~same)[0].tolist()
        got, want = float(actual[tuple(where)]), float(expected[tuple(where)])
        raise AssertionError(f"{name}{where} is {got}, expected {want}\n{what}")
    finite = expected.isfinite() & eager.isfinite()
    error = torch.where(finite, (actual - expected).abs(), 0)
    eager_error = torch.where(finite, (eager - expected).abs(), 0)
    if error.numel() == 0:
        return
    bound = 2 * float(eager_error.max()) + floor
    assert float(error.max()) <= bound, _report(name, error, bound, what)
    mean, mean_bound = float(error.mean()), 1.5 * float(eager_error.mean()) + floor
    assert mean <= mean_bound, f"{name}: mean error {mean:.3e} above {mean_bound:.3e}\n{what}"


def assert_attention_close(out, lse, ref, pt, what: str = "") -> None:
    """The four assertions of the suite.

    Args:
        out, lse: results under test. ``lse`` may be None.
        ref: (out, lse) of the float64 oracle on the same inputs and the same selection.
        pt: (out, lse) of ``pytorch_same_dtype``.
        what: case name or repro line, printed on failure.
    """
    (ref_out, ref_lse), (pt_out, pt_lse) = ref, pt
    assert out.shape == ref_out.shape, f"{what}: out {out.shape}, expected {ref_out.shape}"
    wanted = [("out", out, ref_out, pt_out, 2 * rounding_noise(ref_out, out.dtype))]
    if lse is not None:
        assert lse.dtype == torch.float32 and lse.shape == ref_lse.shape, what
        # Half a unit in the last place of float32: more than that no kernel can promise.
        largest = ref_lse[ref_lse.isfinite()].abs().amax().item() if ref_lse.isfinite().any() else 0
        wanted.append(("lse", lse, ref_lse, pt_lse, max(1e-5, largest * 2**-24)))
    for name, actual, expected, eager, floor in wanted:
        assert_near_eager(name, actual, expected, eager, floor, what)


def oracle_and_eager(problem: Problem) -> tuple[tuple, tuple]:
    """(out, lse) of the float64 oracle and of ``pytorch_same_dtype``, sequence by sequence."""
    own = {name: problem.options.get(name) for name in ("softmax_scale", "sink")}
    masks = {name: problem.options.get(name, None) for name in ("causal", "window")}
    shape, device = problem.q.shape, problem.q.device
    ref = [torch.zeros(size, dtype=torch.float64, device=device) for size in (shape, shape[:-1])]
    pt = torch.zeros_like(problem.q), torch.zeros(shape[:-1], device=device)
    for rows_of, one in sequences_of(problem):
        results = reference.block_sparse_attention(*one.args, **own, **masks, return_lse=True)
        eager = pytorch_same_dtype(*one.args[:3], oracle_times(one), **own)
        for whole, part in zip((*ref, *pt), (*results, *eager), strict=True):
            rows_of(whole).copy_(part)
    return tuple(ref), pt


def check_against_oracle(attention, problem: Problem, what: str = "") -> None:
    """Runs ``attention(q, k, v, index, **options, return_lse=True)`` and compares it."""
    out, lse = attention(*problem.args, **problem.options, return_lse=True)
    assert out.dtype == problem.q.dtype, what
    assert_attention_close(out, lse, *oracle_and_eager(problem), what)
