"""Malformed calls raise and name the argument; unsupported ones print what is supported."""

import math
import re

import pytest
import torch

import attnsieve
from attnsieve import BlockIndex
from cases import DTYPES, HEAD_DIMS, Case, cuda_only, randn, random_index
from layouts import build_layout

MALFORMED = (ValueError, TypeError)


def arguments(device="cpu"):
    dtype = DTYPES[device][0]
    q = randn((2, 4, 100, 64), dtype, device)
    k, v = (randn((2, 2, 150, 64), dtype, device, s) for s in (1, 2))
    return dict(q=q, k=k, v=v, index=random_index(2, 4, 100, 150, device=device))


def call(function=attnsieve.block_sparse_attention, **arguments):
    q, k, v = (arguments.pop(name) for name in ("q", "k", "v"))
    return function(q, k, v, **arguments)


def _index(counts=(2, 4, 2), columns=(2, 4, 2, 3), block=(64, 64), device="cpu"):
    where = dict(dtype=torch.int32, device=device)
    return BlockIndex(torch.zeros(counts, **where), torch.zeros(columns, **where), *block)


TENSOR_MISTAKES = {
    "q rank": ("q", lambda a: dict(q=a["q"][0])),
    "k rank": ("k", lambda a: dict(k=a["k"][0])),
    "v rank": ("v", lambda a: dict(v=a["v"].unsqueeze(0))),
    "q not a tensor": ("q", lambda a: dict(q=[1.0])),
    "k batch": ("k", lambda a: dict(k=a["k"][:1], v=a["v"][:1])),
    "v length": ("v", lambda a: dict(v=a["v"][:, :, :-1])),
    "v heads": ("v", lambda a: dict(v=a["v"][:, :1])),
    "k head_dim": ("k", lambda a: dict(k=a["k"][..., :32], v=a["v"][..., :32])),
    "v head_dim": ("v", lambda a: dict(v=a["v"][..., :32])),
    "k dtype": ("k", lambda a: dict(k=a["k"].double())),
    "v dtype": ("v", lambda a: dict(v=a["v"].double())),
    "heads not divisible": ("q|k|head", lambda a: dict(q=a["q"][:, :3])),
    "heads 0": ("head|q", lambda a: dict(q=a["q"][:, :0], index=None)),
    "kv heads 0": ("head|k", lambda a: dict(k=a["k"][:, :0], v=a["v"][:, :0])),
    "head_dim 0": ("head_dim|q", lambda a: {n: a[n][..., :0] for n in ("q", "k", "v")}),
}

OPTION_MISTAKES = {
    "scale nan": ("softmax_scale", dict(softmax_scale=math.nan)),
    "scale inf": ("softmax_scale", dict(softmax_scale=math.inf)),
    "window too negative": ("window", dict(window=(-2, 0))),
    "window right too negative": ("window", dict(window=(0, -5))),
    "window one side": ("window", dict(window=(3,))),
    "window not a pair": ("window", dict(window=3)),
    "sink shape": ("sink", dict(sink=torch.zeros(3))),
    "sink rank": ("sink", dict(sink=torch.zeros(4, 1))),
    "sink dtype": ("sink", dict(sink=torch.zeros(4, dtype=torch.int32))),
    "index not a BlockIndex": ("index", dict(index=torch.zeros(3))),
    "index batch": ("index|counts", dict(index=_index((3, 4, 2), (3, 4, 2, 3)))),
    "index heads": ("index|counts|head", dict(index=_index((2, 3, 2), (2, 3, 2, 3)))),
    "index heads above Hq": ("index|counts|head", dict(index=_index((2, 8, 2), (2, 8, 2, 3)))),
}


@pytest.mark.parametrize("mistake", TENSOR_MISTAKES)
def test_tensors(device, mistake):
    name, change = TENSOR_MISTAKES[mistake]
    args = arguments(device)
    with pytest.raises(MALFORMED, match=rf"(?i)\b({name})"):
        call(**(args | change(args)))


@pytest.mark.parametrize("mistake", OPTION_MISTAKES)
def test_options(device, mistake):
    name, change = OPTION_MISTAKES[mistake]
    change = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in change.items()
    }
    if mistake in ("index batch", "index heads", "index heads above Hq"):
        change["index"] = change["index"].to(device)
    with pytest.raises(MALFORMED, match=name):
        call(**(arguments(device) | change))


CU = torch.tensor([0, 40, 100])
VARLEN_MISTAKES = {
    "int64": ("cu_seqlens_q", dict(cu_seqlens_q=CU)),
    "cu_seqlens_q alone": ("cu_seqlens", dict(cu_seqlens_k=None)),
    "cu_seqlens_k alone": ("cu_seqlens", dict(cu_seqlens_q=None)),
    "rank": ("cu_seqlens_k", dict(cu_seqlens_k=CU.int()[None])),
    "lengths differ": ("cu_seqlens", dict(cu_seqlens_k=CU.int()[:2])),
    "empty": ("cu_seqlens", dict(cu_seqlens_q=CU.int()[:0], cu_seqlens_k=CU.int()[:0])),
    "batched q": ("q", dict(q=torch.zeros(1, 4, 100, 64))),
    "index batch": ("index|counts", dict(index=_index((3, 4, 2), (3, 4, 2, 3)))),
}


@pytest.mark.parametrize("mistake", VARLEN_MISTAKES)
def test_varlen(mistake):
    name, change = VARLEN_MISTAKES[mistake]
    good = dict(
        q=randn((100, 4, 64)),
        k=randn((100, 2, 64)),
        v=randn((100, 2, 64)),
        cu_seqlens_q=CU.int(),
        cu_seqlens_k=CU.int(),
    )
    call(**good)
    with pytest.raises(MALFORMED, match=name):
        call(**(good | change))


PAGED_MISTAKES = {
    "no seq_lens": ("seq_lens", lambda a: dict(seq_lens=None)),
    "no block_table": ("block_table", lambda a: dict(block_table=None)),
    "block_table dtype": ("block_table", lambda a: dict(block_table=a["block_table"].long())),
    "block_table rank": ("block_table", lambda a: dict(block_table=a["block_table"][0])),
    "block_table batch": ("block_table", lambda a: dict(block_table=a["block_table"][:1])),
    "block_table strided": ("block_table", lambda a: dict(block_table=a["block_table"][:, ::2])),
    "seq_lens dtype": ("seq_lens", lambda a: dict(seq_lens=a["seq_lens"].long())),
    "seq_lens rank": ("seq_lens", lambda a: dict(seq_lens=a["seq_lens"][None])),
    "seq_lens batch": ("seq_lens", lambda a: dict(seq_lens=a["seq_lens"][:1])),
    "seq_lens strided": (
        "seq_lens",
        lambda a: dict(seq_lens=a["seq_lens"].repeat_interleave(2)[::2]),
    ),
    "cu_seqlens_k too": ("cu_seqlens_k", lambda a: dict(cu_seqlens_k=a["seq_lens"])),
    "page_size 24": ("k: page_size", lambda a: dict(k=a["k"][:, :24], v=a["v"][:, :24])),
    "page_size 0": ("k: page_size", lambda a: dict(k=a["k"][:, :0], v=a["v"][:, :0])),
    "page_size of v": ("v: .*page_size", lambda a: dict(v=a["v"][:, :16])),
    "pages of v": ("v: .*pages", lambda a: dict(v=a["v"][:1])),
    "k rank": ("k: .*page_size", lambda a: dict(k=a["k"][0])),
    "k dtype": ("k: ", lambda a: dict(k=a["k"].double())),
    "head_dim": ("k: .*head_dim", lambda a: dict(k=a["k"][..., :32], v=a["v"][..., :32])),
    "heads": ("q: .*heads", lambda a: dict(q=a["q"][:, :3])),
    "q rank": ("q: ", lambda a: dict(q=a["q"][0])),
}


@pytest.mark.parametrize("function", ["block_sparse_attention", "threshold_attention"])
@pytest.mark.parametrize("mistake", PAGED_MISTAKES)
def test_pages(device, mistake, function):
    name, change = PAGED_MISTAKES[mistake]
    problem = build_layout(Case(device, 100, 150, layout="paged", page_size=32))
    good = dict(q=problem.q, k=problem.k, v=problem.v, **problem.options)
    if function == "threshold_attention":
        good["threshold"] = 0.1
    function = getattr(attnsieve, function)
    call(function, **good)
    with pytest.raises(MALFORMED, match=name):
        call(function, **(good | change(good)))


@cuda_only
@pytest.mark.parametrize("name", ["block_table", "seq_lens"])
def test_pages_on_another_device(name):
    problem = build_layout(Case("cuda", 100, 150, layout="paged"))
    options = problem.options | {name: problem.options[name].cpu()}
    with pytest.raises(MALFORMED, match=f"{name}.*device"):
        attnsieve.block_sparse_attention(*problem.args, **options)


def test_garbage_tables_are_memory_safe(device):
    """Any result, but no access outside the tensors and no hang."""
    problem = build_layout(Case(device, 130, 700, layout="paged", page_size=16, density=0.7))
    generator = torch.Generator().manual_seed(0)
    shape = problem.options["block_table"].shape
    problem.k.nan_to_num_(0.0)
    problem.v.nan_to_num_(0.0)
    for low, high in ((-(2**31), 2**31 - 1), (-3, problem.k.shape[0] + 3)):
        table = torch.randint(low, high, shape, generator=generator).int().to(device)
        seq_lens = torch.randint(low, high, shape[:1], generator=generator).int().to(device)
        options = dict(block_table=table, seq_lens=seq_lens, causal=True, return_lse=True)
        out, lse = attnsieve.block_sparse_attention(*problem.args, **options)
        assert out.isfinite().all() and not lse.isnan().any()


THRESHOLD_MISTAKES = {
    "negative": ("threshold", dict(threshold=-0.1)),
    "nan": ("threshold", dict(threshold=math.nan)),
    "string": ("threshold", dict(threshold="0.1")),
    "tensor dtype": ("threshold", dict(threshold=torch.zeros(2, dtype=torch.float64))),
    "tensor shape": ("threshold", dict(threshold=torch.zeros(3))),
    "tensor rank": ("threshold", dict(threshold=torch.zeros(2, 5))),
    "skip_block": ("skip_block", dict(threshold=0.1, skip_block=100)),
    "skip_block 0": ("skip_block", dict(threshold=0.1, skip_block=0)),
}


@pytest.mark.parametrize("mistake", THRESHOLD_MISTAKES)
def test_threshold(device, mistake):
    name, change = THRESHOLD_MISTAKES[mistake]
    change = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in change.items()
    }
    wanted = (*MALFORMED, NotImplementedError) if "skip_block" in mistake else MALFORMED
    with pytest.raises(wanted, match=name):
        call(attnsieve.threshold_attention, **(arguments(device) | change))


SELECT_MISTAKES = {
    "no rule": ("topk", dict()),
    "two rules": ("topk|fraction", dict(topk=1, fraction=0.5)),
    "topk negative": ("topk", dict(topk=-3)),
    "fraction negative": ("fraction", dict(fraction=-0.1)),
    "fraction above 1": ("fraction", dict(fraction=1.5)),
    "fraction nan": ("fraction", dict(fraction=math.nan)),
    "top_p above 1": ("top_p", dict(top_p=1.01)),
    "top_p nan": ("top_p", dict(top_p=math.nan)),
    "min_blocks": ("min_blocks", dict(topk=1, min_blocks=-1)),
    "sink_blocks": ("sink_blocks", dict(topk=1, sink_blocks=-1)),
    "local_blocks": ("local_blocks", dict(topk=1, local_blocks=-1)),
    "block_q": ("block_q", dict(topk=1, block_q=0)),
    "block_k": ("block_k", dict(topk=1, block_k=-64)),
    "window": ("window", dict(topk=1, window=(-2, 0))),
}


@pytest.mark.parametrize("mistake", SELECT_MISTAKES)
def test_selection(device, mistake):
    name, change = SELECT_MISTAKES[mistake]
    with pytest.raises((*MALFORMED, NotImplementedError), match=name):
        attnsieve.select_from_scores(torch.zeros(1, 2, 3, 4, device=device), 192, 256, **change)


def test_selection_scores(device):
    good = torch.zeros(1, 2, 3, 4, device=device)
    attnsieve.select_from_scores(good, 192, 256, topk=1)
    for bad in (good[0], good.half(), good[..., :3], good[:, :, :2]):
        with pytest.raises(MALFORMED, match="scores"):
            attnsieve.select_from_scores(bad, 192, 256, topk=1)


def test_merge_states(device):
    outs, lses = randn((2, 3, 5, 64), device=device), randn((2, 3, 5), device=device)
    attnsieve.merge_states(outs, lses)
    for bad in (lses[:1], lses[..., :4], lses.half(), lses[0]):
        with pytest.raises(MALFORMED, match="lses"):
            attnsieve.merge_states(outs, bad)
    with pytest.raises((*MALFORMED, NotImplementedError), match="outs"):
        attnsieve.merge_states(outs.int(), lses)


@pytest.mark.parametrize("head_dim", [12, 264, 512])
def test_unsupported_head_dim_lists_the_supported_ones(device, head_dim):
    dtype = DTYPES[device][0]
    q = randn((1, 2, 10, head_dim), dtype, device)
    with pytest.raises(NotImplementedError, match="256|128"):
        attnsieve.block_sparse_attention(q, q, q)


@pytest.mark.parametrize("head_dim", HEAD_DIMS["cpu"])
def test_cuda_head_dims(cuda_backend, head_dim):
    """Computed exactly where the capability table says so."""
    q = randn((1, 2, 10, head_dim), torch.bfloat16, "cuda")
    if head_dim in HEAD_DIMS[cuda_backend]:
        assert attnsieve.block_sparse_attention(q, q, q).isfinite().all()
        return
    with pytest.raises(NotImplementedError, match="64.*128"):
        attnsieve.block_sparse_attention(q, q, q)


def test_forced_backend_that_does_not_exist(device, monkeypatch):
    if device == "cpu":
        pytest.skip("the CPU has one backend")
    monkeypatch.setenv("ATTNSIEVE_BACKEND", "sm_10")
    with pytest.raises((*MALFORMED, NotImplementedError), match="sm_10"):
        call(**arguments(device))


@cuda_only
def test_cuda_float32():
    q = randn((1, 2, 10, 64), torch.float32, "cuda")
    with pytest.raises(NotImplementedError, match="float16|bfloat16"):
        attnsieve.block_sparse_attention(q, q, q)


@cuda_only
def test_mixed_devices():
    args = arguments("cuda")
    with pytest.raises(MALFORMED, match="index|counts|device"):
        call(**(args | dict(index=args["index"].to("cpu"))))
    with pytest.raises(MALFORMED, match="v|device"):
        call(**(args | dict(v=args["v"].cpu())))


def test_unsupported_dtype_lists_the_supported_ones(device):
    for dtype in (torch.float64, torch.int32, torch.int8):
        q = torch.zeros(1, 2, 10, 64, dtype=dtype, device=device)
        with pytest.raises((NotImplementedError, TypeError), match="float16"):
            attnsieve.block_sparse_attention(q, q, q)


DTYPE_REFUSALS = {  # float32 runs on CUDA too, or it does not
    "decode": ("(CPU only)", lambda x: attnsieve.decode(x, x, x)),
    "proxy_scores": ("", lambda x: attnsieve.proxy_scores(x, x)),
    "append_kv": (
        "",
        lambda x: attnsieve.append_kv(x, x, x, x, seq_lens=torch.full((1,), 8, device=x.device)),
    ),
    "quantize_blocks": ("", attnsieve.quantize_blocks),
    "merge_states": ("", lambda x: attnsieve.merge_states(x, x[..., 0].float())),
    "block_sparse_attention": (
        "(CPU only)",
        lambda x: attnsieve.block_sparse_attention(x, x, x),
    ),
}


@pytest.mark.parametrize("op", DTYPE_REFUSALS)
def test_dtype_refusals_say_where_float32_runs(device, op):
    where, run = DTYPE_REFUSALS[op]
    text = f"supported: float32{' ' * bool(where)}{where}, float16, bfloat16"
    with pytest.raises(NotImplementedError, match=re.escape(text)):
        run(torch.zeros(1, 2, 8, 64, dtype=torch.float64, device=device))


@pytest.mark.parametrize("block", [(16, 64), (64, 48), (64, 8), (256, 256), (65, 64)], ids=str)
def test_unsupported_block_sizes_list_the_supported_ones(device, block):
    args = arguments(device)
    args["index"] = random_index(2, 4, 100, 150, block, device=device)
    with pytest.raises((NotImplementedError, ValueError), match="64.*128"):
        call(**args)


def test_backward_is_refused_and_not_silently_cut(device):
    args = arguments(device)
    args["q"].requires_grad_()
    with pytest.raises((NotImplementedError, RuntimeError), match="(?i)backward|grad|derivative"):
        call(**args).sum().backward()


BAD_FIELDS = {
    "counts dtype": (TypeError, "counts", dict(counts=torch.zeros(1, 1, 2))),
    "columns dtype": (TypeError, "columns", dict(columns=torch.zeros(1, 1, 2, 3).long())),
    "counts rank": (ValueError, "counts", dict(counts=torch.zeros(1, 2).int())),
    "columns rank": (ValueError, "columns", dict(columns=torch.zeros(1, 1, 2).int())),
    "shapes differ": (ValueError, "columns", dict(columns=torch.zeros(1, 1, 3, 3).int())),
    "not a tensor": (TypeError, "counts", dict(counts=[1])),
    "block_q type": (TypeError, "block_q", dict(block_q=64.0)),
    "block_k sign": (ValueError, "block_k", dict(block_k=-64)),
    "devices": (ValueError, "columns", dict(columns=torch.zeros(1, 1, 2, 3).int().to("meta"))),
}


@pytest.mark.parametrize("mistake", BAD_FIELDS)
def test_block_index_fields(mistake):
    error, name, change = BAD_FIELDS[mistake]
    good = dict(
        counts=torch.zeros(1, 1, 2).int(),
        columns=torch.zeros(1, 1, 2, 3).int(),
        block_q=64,
        block_k=64,
    )
    BlockIndex(**good)
    with pytest.raises(error, match=name):
        BlockIndex(**(good | change))
