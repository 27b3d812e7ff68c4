"""Random problems against the oracle. CI draws the same ones each time.

``ATTNSIEVE_FUZZ=2000 pytest tests/test_fuzz.py`` draws that many fresh ones. A failure prints the
line that repeats it.
"""

import functools
import os

import torch
from hypothesis import given
from hypothesis import strategies as st

import attnsieve
from attnsieve import BlockIndex, reference
from cases import (
    BLOCKS,
    DTYPES,
    EDGE,
    FORCE_BACKEND,
    PAGE_SIZES,
    Problem,
    head_dims,
    randn,
    random_index,
    refuses_votes,
)
from layouts import random_lengths, to_pages
from numerics import (
    assert_attention_close,
    assert_bitwise,
    check_against_oracle,
    pytorch_same_dtype,
)
from test_selection_block import assert_same_index, block_scores, scores_shape

LENGTHS = st.one_of(st.sampled_from(EDGE), st.integers(1, 400))
VALUES = ("normal", "grid", "large", "denormal", "zero")
LAYOUTS = ("contiguous", "bshd", "padded", "fused")
SIDES = st.one_of(st.just(-1), st.integers(0, 300))


def values_of(kind, shape, dtype, device, seed):
    """Inputs whose sums are easy (grid: exact in any order) or nasty (large, denormal)."""
    x = randn(shape, seed=seed)
    if kind == "grid":
        x = (x * 2).round().clamp(-3, 3)
    elif kind == "large":
        x = x.sign() * 30
    elif kind == "denormal":
        x = x * torch.finfo(dtype).tiny * 0.25
    elif kind == "zero":
        x = x * 0
    return x.to(device=device, dtype=dtype)


def laid_out(x, layout):
    if layout == "bshd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded":
        big = x.new_full([n + 1 for n in x.shape[:-1]] + [x.shape[-1] + 128], torch.nan)
        return big[tuple(slice(0, n) for n in x.shape)].copy_(x)
    if layout == "fused":
        return x.new_full((*x.shape[:-1], 3, x.shape[-1]), torch.nan)[..., 2, :].copy_(x)
    return x


def draw_problem(device, spec):
    group = spec["group"]
    kv_heads = spec["kv_heads"]
    num_heads = group * kv_heads
    shape_q = (spec["batch"], num_heads, spec["seqlen_q"], spec["head_dim"])
    shape_k = (spec["batch"], kv_heads, spec["seqlen_k"], spec["head_dim"])
    seed = spec["seed"]
    tensors = [
        laid_out(values_of(spec["values"], shape, spec["dtype"], device, seed + i), layout)
        for i, (shape, layout) in enumerate(
            zip((shape_q, shape_k, shape_k), spec["layouts"], strict=True)
        )
    ]
    index = None
    if spec["density"] is not None:
        list_heads = {"q": num_heads, "kv": kv_heads, "one": 1}[spec["list_heads"]]
        seqlens = spec["seqlen_q"], spec["seqlen_k"]
        index = random_index(
            spec["batch"], list_heads, *seqlens, spec["block"], spec["density"], device, seed
        )
    options = dict(causal=spec["causal"], window=spec["window"])
    if spec["sink"]:
        options["sink"] = randn((num_heads,), device=device, seed=seed)
    return Problem(*tensors, index, options)


def specs(device):
    return st.fixed_dictionaries(
        dict(
            batch=st.integers(1, 3),
            kv_heads=st.integers(1, 3),
            group=st.sampled_from((1, 2, 3, 4)),
            seqlen_q=LENGTHS,
            seqlen_k=LENGTHS,
            head_dim=st.sampled_from(head_dims(device)),
            dtype=st.sampled_from(DTYPES[device]),
            causal=st.booleans(),
            window=st.one_of(st.none(), st.tuples(SIDES, SIDES)),
            block=st.sampled_from(BLOCKS),
            density=st.sampled_from((None, 0.0, "one", 0.1, 0.5, 1.0)),
            list_heads=st.sampled_from(("q", "kv", "one")),
            sink=st.booleans(),
            values=st.sampled_from(VALUES),
            layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
            seed=st.integers(0, 2**20),
        )
    )


def repro(check, device, *arguments):
    call = f"test_fuzz.{check.__name__}({device!r}, {', '.join(map(repr, arguments))})"
    forced = os.environ.get(FORCE_BACKEND)
    backend = f"{FORCE_BACKEND}={forced} " if forced else ""
    return f'repro: cd tests && {backend}python -c "import torch, test_fuzz; {call}"'


def check_attend(device, spec):
    problem = draw_problem(device, spec)
    check_against_oracle(attnsieve.block_sparse_attention, problem, f"{spec}")


def check_pages(device, spec, page_size):
    """The whole sequence in pages: lists of the batched problem fit where no block is cut off."""
    problem = draw_problem(device, spec)
    lengths = random_lengths(spec["seqlen_k"], spec["batch"], spec["seed"])
    paged = to_pages(problem, lengths, page_size, spec["seed"])
    check_against_oracle(attnsieve.block_sparse_attention, paged, f"{spec} {page_size}")


def check_threshold(device, spec, threshold, skip_block):
    problem = draw_problem(device, spec)
    args, options = problem.args[:3], dict(problem.options)
    run = dict(index=problem.index, skip_block=skip_block, return_lse=True, **options)
    attention = functools.partial(
        attnsieve.threshold_attention, *args, threshold, return_counters=True, **run
    )
    if refuses_votes(spec["head_dim"], skip_block, attention):
        return
    out, lse, counters = attention()
    sink = options.pop("sink", None)
    walk = reference.threshold_walk(
        *args[:2], threshold, index=problem.index, skip_block=skip_block, **options
    )
    clear = walk.margin > 1e-3
    assert_bitwise(counters[..., 1], walk.counters[..., 1], "totals")
    assert_bitwise(counters[clear], walk.counters[clear], "skipped")
    ref = reference.threshold_attention(*args, threshold, **run)
    pt = pytorch_same_dtype(*args, walk.times, sink=sink)
    here = [x[clear] for x in (out, lse, *ref, *pt)]
    assert_attention_close(*here[:2], here[2:4], here[4:], f"{spec}")


def check_selection(device, shape, block, kind, options):
    scores = block_scores(scores_shape(shape, block), kind, device)
    options = dict(options, block_q=block[0], block_k=block[1])
    index = attnsieve.select_from_scores(scores, *shape, **options)
    assert_same_index(index, reference.select_from_scores(scores, *shape, **options), f"{options}")


def check_garbage_index(device, seqlens, block, seed):
    """Counts and ids in and out of range, repeated and unordered."""
    generator = torch.Generator().manual_seed(seed)
    rows, num_k_blocks = -(-seqlens[0] // block[0]), -(-seqlens[1] // block[1])
    low, high = -3, num_k_blocks + 3
    columns = torch.randint(low, high, (1, 2, rows, 6), generator=generator).int()
    counts = torch.randint(-2, 9, (1, 2, rows), generator=generator).int()
    index = BlockIndex(counts.to(device), columns.to(device), *block)
    dtype = DTYPES[device][0]
    q = randn((1, 2, seqlens[0], 64), dtype, device, seed)
    k = randn((1, 2, seqlens[1], 64), dtype, device, seed + 1)
    out, lse = attnsieve.block_sparse_attention(q, k, k, index, return_lse=True)
    ref_out, ref_lse = reference.block_sparse_attention(q, k, k, index, return_lse=True)
    torch.testing.assert_close(lse.double(), ref_lse, rtol=0, atol=1e-4)
    torch.testing.assert_close(out.double(), ref_out, rtol=2**-6, atol=2**-7)


def run(check, device, *arguments):
    try:
        check(device, *arguments)
    except BaseException:
        print(repro(check, device, *arguments))
        raise


def test_attend(device):
    @given(specs(device))
    def fuzz(spec):
        run(check_attend, device, spec)

    fuzz()


def test_pages(device):
    @given(specs(device), st.sampled_from(PAGE_SIZES))
    def fuzz(spec, page_size):
        run(check_pages, device, spec, page_size)

    fuzz()


def test_threshold(device):
    @given(specs(device), st.sampled_from((0.0, 1e-3, 0.3, 2.0)), st.sampled_from((64, 128)))
    def fuzz(spec, threshold, skip_block):
        run(check_threshold, device, spec, threshold, skip_block)

    fuzz()


def test_selection(device):
    rules = st.one_of(
        st.builds(lambda k: dict(topk=k), st.integers(1, 12)),
        st.builds(lambda f: dict(fraction=f), st.sampled_from((0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0))),
    )
    forced = st.fixed_dictionaries(
        dict(
            min_blocks=st.integers(0, 4),
            sink_blocks=st.integers(0, 3),
            local_blocks=st.integers(0, 3),
            diagonal=st.booleans(),
            causal=st.booleans(),
            window=st.one_of(st.none(), st.tuples(SIDES, SIDES)),
        )
    )
    shapes = st.tuples(st.integers(1, 900), st.integers(1, 1500))

    @given(shapes, st.sampled_from(BLOCKS), st.integers(0, 3), rules, forced)
    def fuzz(shape, block, kind, rule, forced):
        run(check_selection, device, shape, block, kind, rule | forced)

    fuzz()


def test_garbage_index(device):
    @given(st.tuples(LENGTHS, LENGTHS), st.sampled_from(BLOCKS), st.integers(0, 2**20))
    def fuzz(seqlens, block, seed):
        run(check_garbage_index, device, seqlens, block, seed)

    fuzz()
