"""Layout never changes a bit: any strides with a contiguous last dimension, or a clear error."""

import pytest
import torch

import attnsieve
from attnsieve import BlockIndex
from cases import DTYPES, Case, build, randn
from layouts import build_layout
from numerics import assert_bitwise

attend = attnsieve.block_sparse_attention


def bshd(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def heads_outermost(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def padded(x):
    """A slice of a tensor larger by one on every dimension but the last, there by 128."""
    sizes = [n + 1 for n in x.shape[:-1]] + [x.shape[-1] + 128]
    big = torch.full(sizes, torch.nan, dtype=x.dtype, device=x.device)
    view = big[tuple(slice(0, n) for n in x.shape)]
    return view.copy_(x)


def fused(x):
    """One third of a fused qkv tensor: rows three times as far apart."""
    big = torch.full((*x.shape[:-1], 3, x.shape[-1]), torch.nan, dtype=x.dtype, device=x.device)
    return big[..., 1, :].copy_(x)


def shifted_rows(x):
    """Starts 16 bytes into its storage."""
    step = 16 // x.element_size()
    flat = torch.empty(x.numel() + step, dtype=x.dtype, device=x.device)
    return flat[step:].view(x.shape).copy_(x)


LAYOUTS = (bshd, heads_outermost, padded, fused, shifted_rows)


@pytest.mark.parametrize("operand", ["q", "k", "v", "all"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_each_operand_alone(device, layout, operand):
    for dtype in DTYPES[device][:2]:
        problem = build(Case(device, 130, 200, dtype=dtype, causal=True, density=0.6))
        operands = dict(q=problem.q, k=problem.k, v=problem.v)
        changed = {
            name: layout(x) if operand in (name, "all") else x for name, x in operands.items()
        }
        expected = attend(**operands, index=problem.index, causal=True, return_lse=True)
        actual = attend(**changed, index=problem.index, causal=True, return_lse=True)
        assert_bitwise(actual, expected, f"{layout.__name__} {operand}")


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("seqlen_k", [33, 65, 200])
def test_expanded_keys_and_values(device, dim, seqlen_k):
    """Stride 0 over batch or heads."""
    dtype = DTYPES[device][0]
    shape = [2, 4, seqlen_k, 64]
    q = randn((2, 4, 70, 64), dtype, device)
    shape[dim] = 1
    k, v = (randn(shape, dtype, device, s).expand(2, 4, seqlen_k, 64) for s in (1, 2))
    assert k.stride(dim) == 0
    expected = attend(q, k.contiguous(), v.contiguous(), return_lse=True)
    assert_bitwise(attend(q, k, v, return_lse=True), expected, "expanded")


@pytest.mark.parametrize("layout", [padded, fused], ids=lambda f: f.__name__)
def test_varlen_operands(device, layout):
    q, k, v = (randn((200, 4, 64), DTYPES[device][0], device, s) for s in range(3))
    cu = torch.tensor([0, 77, 200], device=device).int()
    options = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True, return_lse=True)
    expected = attend(q, k, v, **options)
    assert_bitwise(attend(layout(q), layout(k), layout(v), **options), expected, "varlen")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_pages(device, layout):
    """Caches of any strides, [num_pages, Hkv, page_size, D] storage among them; strided tables."""
    problem = build_layout(Case(device, 130, 200, causal=True, density=0.6, layout="paged"))
    expected = attend(*problem.args, **problem.options, return_lse=True)
    table, seq_lens = problem.options["block_table"], problem.options["seq_lens"]
    problem.options["block_table"] = torch.cat([table, table - 77], dim=1)[:, : table.shape[1]]
    problem.options["seq_lens"] = torch.cat([seq_lens, seq_lens - 77])[: seq_lens.shape[0]]
    problem.k, problem.v = layout(problem.k), layout(problem.v)
    actual = attend(*problem.args, **problem.options, return_lse=True)
    assert_bitwise(actual, expected, layout.__name__)


def test_strided_index_and_sink_are_right_or_refused(device):
    problem = build(Case(device, 200, 300, density=0.6, sink=True))
    expected = attend(*problem.args, **problem.options, return_lse=True)
    counts, columns = problem.index.counts, problem.index.columns
    layouts = {
        "permuted": (
            counts.permute(2, 1, 0).contiguous().permute(2, 1, 0),
            columns.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
        ),
        "sliced": (
            torch.stack([counts, -counts], dim=-1)[..., 0],
            torch.cat([columns, columns - 77], dim=-1)[..., : columns.shape[-1]],
        ),
    }
    problem.options["sink"] = torch.stack([problem.options["sink"]] * 2, dim=1)[:, 0]
    for name, (counts, columns) in layouts.items():
        assert not columns.is_contiguous()
        index = BlockIndex(counts, columns, 64, 64)
        try:
            actual = attend(*problem.args[:3], index, **problem.options, return_lse=True)
        except ValueError as error:
            assert "contiguous" in str(error)
        else:
            assert_bitwise(actual, expected, name)


def test_index_expanded_over_batch_and_heads(device):
    problem = build(Case(device, 200, 300))
    one = build(Case(device, 200, 300, batch=1, density=0.5, list_heads="one")).index
    expanded = BlockIndex(one.counts.expand(2, 4, -1), one.columns.expand(2, 4, -1, -1), 64, 64)
    copied = BlockIndex(expanded.counts.contiguous(), expanded.columns.contiguous(), 64, 64)
    expected = attend(*problem.args[:3], copied, return_lse=True)
    assert_bitwise(attend(*problem.args[:3], expanded, return_lse=True), expected, "expanded")


@pytest.mark.parametrize("operand", ["q", "k", "v"])
def test_misaligned_rows_are_right_or_refused(device, operand):
    """Storage that starts one element in: rows are not 16-byte aligned."""
    problem = build(Case(device, 100, 150))
    operands = dict(q=problem.q, k=problem.k, v=problem.v)
    expected = attend(**operands, return_lse=True)
    x = operands[operand]
    flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)
    operands[operand] = flat[1:].view(x.shape).copy_(x)
    try:
        actual = attend(**operands, return_lse=True)
    except ValueError as error:
        assert str(error).startswith(operand) and "16 bytes" in str(error)
    else:
        assert_bitwise(actual, expected, "misaligned")


@pytest.mark.parametrize("operand", ["q", "k", "v"])
def test_strided_last_dimension_is_right_or_refused(device, operand):
    problem = build(Case(device, 100, 150))
    operands = dict(q=problem.q, k=problem.k, v=problem.v)
    expected = attend(**operands, return_lse=True)
    x = operands[operand]
    operands[operand] = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    try:
        actual = attend(**operands, return_lse=True)
    except ValueError as error:
        assert operand in str(error) and "contiguous" in str(error)
    else:
        assert_bitwise(actual, expected, "strided last dimension")


def test_scores_and_states(device):
    scores = randn((2, 3, 8, 10), device=device)
    rules = dict(topk=3, causal=True)
    expected = attnsieve.select_from_scores(scores, 512, 640, **rules)
    for layout in (bshd, heads_outermost, padded):
        index = attnsieve.select_from_scores(layout(scores), 512, 640, **rules)
        assert_bitwise(index.columns, expected.columns, layout.__name__)
    outs, lses = randn((3, 2, 50, 64), DTYPES[device][0], device), randn((3, 2, 50), device=device)
    expected = attnsieve.merge_states(outs, lses)
    assert_bitwise(attnsieve.merge_states(padded(outs), bshd(lses[None])[0]), expected, "states")


def test_out_and_lse_layout(device):
    """out is contiguous as [B, H, S, D], or follows q; either way lse is contiguous."""
    problem = build(Case(device, 100, 150))
    for q in (problem.q, bshd(problem.q)):
        out, lse = attend(q, problem.k, problem.v, return_lse=True)
        assert out.stride(-1) == 1 and lse.is_contiguous()
        assert out.is_contiguous() or out.stride() == q.stride()
