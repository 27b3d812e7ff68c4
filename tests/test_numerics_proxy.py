"""Proxy scores equal their float64 oracle."""

import math

import pytest
import torch

import attnsieve
from attnsieve import reference_decode
from cache_ops import CacheOps
from cases import DTYPES, pairwise, randn
from layouts import deal_pages, fill_pages
from numerics import assert_near_eager, rounding_noise

NAN, INF = math.nan, math.inf
E4M3 = torch.float8_e4m3fn
HEADS = ((1, 1), (8, 8), (8, 2), (6, 3), (7, 1), (16, 1), (66, 2))  # (query heads, key heads)
REDUCTIONS = (None, "max", "mean", "sum")


@pytest.fixture
def op(device):
    return CacheOps(device)


CASES = pairwise(
    dtype=DTYPES["cpu"],
    codes=(None, E4M3, torch.int8),
    heads=HEADS,
    out_heads=("q", "key", "one"),
    rows=(1, 2, 8, 70),
    head_dim=(8, 16, 64, 128, 256),
    lengths=((1, 0), (17, 64), (300, 129), (1400, 333)),
    cache=(None, 1, 16, 48),
    element=("dot", "relu_dot", "bounds"),
    row_reduce=REDUCTIONS,
    softmax=(False, True),
    head_reduce=REDUCTIONS[1:],
    page_reduce=REDUCTIONS,
    page_size=(1, 5, 64, 1500),
    skip=((0, 0), (3, 2), (40, 130)),
    causal=(False, True),
    weights=(0, 1, 2, 3),
    scale=(None, 1.0),
    scaled=(False, True),
)


def draw_keys(pick, shape, seed):
    """Keys in the case's type, and their scales or None."""
    keys = randn(shape, seed=seed)
    scale = randn(shape[:-1], seed=seed + 1).abs() + 0.1 if pick["scaled"] else None
    if pick["element"] == "bounds":  # minima and maxima, of one scale
        keys = keys.sort(-2).values
        scale = None if scale is None else scale[..., :1].repeat_interleave(2, -1)
    if pick["codes"] is None:
        return keys.to(pick["dtype"]), scale
    if scale is None:
        scale = torch.full(shape[:-1], 0.03)
    keys = (keys * 30).clamp(-127, 127)
    return (keys.round() if pick["codes"] is torch.int8 else keys).to(pick["codes"]), scale


def masked_reduce(x, seen, how, dim):
    """``x`` and ``seen`` over ``dim``, as one writes it in PyTorch."""
    any_seen = seen.any(dim)
    if how == "max":
        x = x.masked_fill(~seen, -INF).amax(dim)
    else:
        x = torch.where(seen, x, 0.0).sum(dim)
        x = x / seen.sum(dim) if how == "mean" else x
    return x.masked_fill(~any_seen, -INF), any_seen


def eager_scores(q, units, seen, weights, options):
    """float32 PyTorch over ``units`` [B, Hp, M, dp], bounds [B, Hp, M, 2, dp]; seen [B, R, M].

    Also the largest absolute logit of a softmax, 0 without one.
    """
    largest = 0.0
    group = q.shape[1] // units.shape[1]
    units = units.repeat_interleave(group, 1)
    q = q.float()
    if options["element"] == "bounds":
        x = (q[:, :, :, None, None] * units[:, :, None]).amax(4).sum(-1)
    else:
        x = q @ units.transpose(-1, -2)
        x = x.relu() if options["element"] == "relu_dot" else x
    scale = options.get("score_scale")
    x = x * (q.shape[-1] ** -0.5 if scale is None else scale)
    if weights is not None:
        shape = (1, -1, 1) if weights.dim() == 1 else (*weights.shape, 1)[:3]
        x = x * weights.reshape(shape).unsqueeze(-1)
    x, seen = x.transpose(1, 2), seen[:, :, None].expand(*seen.shape[:2], q.shape[1], -1)
    if options["row_reduce"] is not None:
        x, seen = masked_reduce(x, seen, options["row_reduce"], 1)
        x, seen = x.unsqueeze(1), seen.unsqueeze(1)
    if options["softmax"]:
        largest = float(x.masked_fill(~seen, 0).abs().max())
        x = torch.softmax(x.masked_fill(~seen, -INF), -1).masked_fill(~seen, -INF)
    x, seen = (t.unflatten(2, (options["num_out_heads"], -1)) for t in (x, seen))
    x, seen = masked_reduce(x, seen, options["head_reduce"], 3)
    if options["page_reduce"] is not None:
        missing = -x.shape[-1] % options["page_size"]
        x, seen = (torch.nn.functional.pad(t, (0, missing)) for t in (x, seen))
        x, seen = (t.unflatten(-1, (-1, options["page_size"])) for t in (x, seen))
        x, seen = masked_reduce(x, seen, options["page_reduce"], -1)
    x = x.masked_fill(~seen, -INF)
    return x.squeeze(1) if options["row_reduce"] is not None else x, largest


def visible_units(pick, lengths, units, unit_keys):
    """bool [B, R, units]: candidates of every row, written out."""
    first, last = pick["skip"]
    seen = torch.zeros(len(lengths), pick["rows"], units, dtype=torch.bool)
    for b, length in enumerate(lengths):
        total = -(-length // unit_keys)
        for i in range(pick["rows"]):
            for u in range(first, max(min(total - last, units), 0)):
                key = u * unit_keys  # the unit's first
                seen[b, i, u] = not pick["causal"] or key <= i + length - pick["rows"]
    return seen


def build(pick, seed=0):
    """Arguments and options of a call, and the same problem for ``eager_scores``."""
    (num_heads, key_heads), lengths = pick["heads"], pick["lengths"]
    bounds = pick["element"] == "bounds"
    unit_keys = pick["page_size"] if bounds else 1
    capacity = max(lengths) + 5
    units = -(-capacity // unit_keys)
    q = randn((2, num_heads, pick["rows"], pick["head_dim"]), pick["dtype"], seed=seed)
    shape = (2, key_heads, units, *((2,) if bounds else ()), pick["head_dim"])
    keys, scale = draw_keys(pick, shape, seed + 1)
    clean = keys.float() if scale is None else keys.float() * scale.unsqueeze(-1)
    options = dict(
        element=pick["element"],
        row_reduce=pick["row_reduce"],
        softmax=pick["softmax"],
        head_reduce=pick["head_reduce"],
        num_out_heads={"q": num_heads, "key": key_heads, "one": 1}[pick["out_heads"]],
        page_reduce=None if bounds else pick["page_reduce"],
        skip_first=pick["skip"][0],
        skip_last=pick["skip"][1],
        causal=pick["causal"],
        score_scale=pick["scale"],
    )
    if bounds or pick["page_reduce"] is not None:
        options["page_size"] = pick["page_size"]
    weights = None
    if pick["weights"] > 0:
        weights = randn((2, num_heads, pick["rows"]), seed=seed + 5)
        weights = weights[0, :, 0] if pick["weights"] == 1 else weights
        options["head_weights"] = weights = weights[..., 0] if pick["weights"] == 2 else weights
    seen = visible_units(pick, lengths, units, unit_keys)
    eager = (q, clean, seen, weights, options.copy())

    used = [-(-n // unit_keys) for n in lengths]
    scale_rows = None if scale is None else scale.clone()
    keys = keys.float()
    for b, n in enumerate(used):  # memory behind the sequence
        keys[b, :, n:] = 0 if pick["codes"] is torch.int8 else NAN
        if scale is not None:
            scale_rows[b, :, n:] = NAN
    target = pick["codes"] or pick["dtype"]
    page = 1 if bounds else pick["cache"]
    options["seq_lens"] = torch.tensor(lengths, dtype=torch.int32)
    if pick["cache"] is None:
        if bounds:
            keys = keys.transpose(1, 2).contiguous()
            scale_rows = None if scale is None else scale_rows.transpose(1, 2)
        return (q, keys.to(target)), options | dict(key_scale=scale_rows), eager
    table = deal_pages(used, -(-units // page), page, seed)
    options["block_table"] = table

    def paged(x, fill):  # [B, H, units, ..., D] -> pages
        flat = x.transpose(2, -2).flatten(1, -3) if bounds else x
        out = fill_pages(flat, used, table, page, fill)
        return out.view(-1, key_heads, 2, x.shape[-1]) if bounds else out

    keys = paged(keys, 0 if pick["codes"] is torch.int8 else NAN).to(target)
    if scale is not None:
        scale_rows = paged(scale_rows.unsqueeze(-1), NAN).squeeze(-1)
    return (q, keys), options | dict(key_scale=scale_rows), eager


@pytest.mark.parametrize("pick", CASES, ids=[str(i) for i in range(len(CASES))])
def test_scores_equal_the_oracle(op, pick):
    """Scores are float32 whatever q is, so they are held to float32 PyTorch."""
    arguments, options, problem = build(pick)
    got = op.proxy_scores(*arguments, **options)
    ref = reference_decode.proxy_scores(*arguments, **options)
    scores, largest = eager_scores(*problem)
    eager = torch.full_like(ref, -INF, dtype=torch.float32)  # pages hold a few units more
    eager[..., : scores.shape[-1]] = scores
    assert got.dtype == torch.float32 and got.shape == ref.shape
    finite = ref.masked_fill(~ref.isfinite(), 0)
    # What a softmax makes of the rounding of its largest logit and of another one.
    floor = 2 * rounding_noise(finite, got.dtype) + float(finite.abs().max()) * largest * 2**-23
    assert_near_eager("scores", got, ref, eager, floor, str(pick))


def test_the_oracle_cases_hold_scores():
    finite = [attnsieve.proxy_scores(*a, **o).isfinite().any() for a, o, _ in map(build, CASES)]
    assert sum(finite) > 0.7 * len(CASES)
