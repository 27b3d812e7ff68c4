"""The ops are good torch citizens: opcheck, compile, export, and schemas that do not drift."""

import pytest
import torch

import attnsieve
from attnsieve import BlockIndex
from cases import DTYPES, Case, build, randn, random_index
from layouts import build_layout
from numerics import assert_bitwise

ops = torch.ops.attnsieve

SCHEMAS = {
    "attend": "attnsieve::attend(Tensor q, Tensor k, Tensor v, Tensor? counts, Tensor? columns, "
    "int block_q, int block_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? block_table, "
    "Tensor? seq_lens, Tensor? sink, float? threshold, Tensor? threshold_per_head, "
    "int skip_block, float softmax_scale, bool causal, int window_left, int window_right) "
    "-> (Tensor out, Tensor lse, Tensor counters)",
    "merge_states": "attnsieve::merge_states(Tensor outs, Tensor lses) -> (Tensor out, Tensor lse)",
    "select_blocks": "attnsieve::select_blocks(Tensor scores, int seqlen_q, int seqlen_k, "
    "int block_q, int block_k, int? topk, float? fraction, float? top_p, int min_blocks, "
    "int sink_blocks, int local_blocks, bool diagonal, bool causal, int window_left, "
    "int window_right) -> (Tensor counts, Tensor columns)",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    """A graph saved by an older version must still load: change this snapshot knowingly."""
    schema = getattr(ops, name).default._schema
    snapshot = torch._C.parse_schema(SCHEMAS[name])
    assert schema.is_backward_compatible_with(snapshot), f"{schema}\nagainst\n{snapshot}"


def bshd(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def padded(x):
    big = torch.zeros([n + 1 for n in x.shape[:-1]] + [x.shape[-1] * 2], dtype=x.dtype)
    return big.to(x.device)[tuple(slice(0, n) for n in x.shape)].copy_(x)


def attend_sample(device, layout=lambda x: x, index=None, varlen=False, batch=2, **change):
    dtype = change.pop("dtype", DTYPES[device][0])
    if varlen:
        q = layout(randn((150, 4, 64), dtype, device))
        k, v = (layout(randn((150, 2, 64), dtype, device, s)) for s in (1, 2))
        cu = torch.tensor([0, 60, 150], device=device).int()
    else:
        q = layout(randn((batch, 4, 100, 64), dtype, device))
        k, v = (layout(randn((batch, 2, 150, 64), dtype, device, s)) for s in (1, 2))
        cu = None
    arguments = dict(
        q=q,
        k=k,
        v=v,
        counts=None if index is None else index.counts,
        columns=None if index is None else index.columns,
        block_q=64,
        block_k=64,
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
        block_table=None,
        seq_lens=None,
        sink=None,
        threshold=None,
        threshold_per_head=None,
        skip_block=128,
        softmax_scale=0.125,
        causal=False,
        window_left=-1,
        window_right=-1,
    )
    return tuple((arguments | change).values())


def paged_sample(device, **change):
    """The sample's keys and values in a cache of 12 pages of 32."""
    dtype = DTYPES[device][0]
    k, v = (randn((12, 32, 2, 64), dtype, device, s) for s in (1, 2))
    table = torch.arange(10, device=device).int().view(2, 5)
    seq_lens = torch.tensor([150, 67], device=device).int()
    return attend_sample(device, k=k, v=v, block_table=table, seq_lens=seq_lens, **change)


def attend_samples(device):
    lists = random_index(2, 4, 100, 150, density=0.6, device=device)
    flat = random_index(2, 1, 90, 90, density=0.6, device=device)
    small = random_index(2, 4, 100, 160, (64, 16), density=0.6, device=device)
    dtypes = DTYPES[device]
    return {
        "dense": attend_sample(device, causal=True),
        "second dtype": attend_sample(device, dtype=dtypes[1]),
        "bshd": attend_sample(device, bshd),
        "padded": attend_sample(device, padded, window_left=30, window_right=0),
        "index": attend_sample(device, index=lists),
        "index bshd": attend_sample(device, bshd, lists, causal=True),
        "sink": attend_sample(device, sink=torch.zeros(4, device=device)),
        "threshold": attend_sample(device, index=lists, threshold=0.1),
        "threshold tensor": attend_sample(
            device, padded, threshold_per_head=torch.full((2, 4), 0.1, device=device)
        ),
        "varlen": attend_sample(device, varlen=True, causal=True),
        "varlen index": attend_sample(device, index=flat, varlen=True, threshold=0.5),
        "index of small blocks": attend_sample(device, index=small, block_k=16, causal=True),
        "paged": paged_sample(device, causal=True),
        "paged bshd": paged_sample(device, layout=bshd, sink=torch.zeros(4, device=device)),
        "paged index": paged_sample(device, index=small, block_k=16, threshold=0.1),
        "paged varlen": paged_sample(device, varlen=True, cu_seqlens_k=None, causal=True),
        "one of everything": attend_sample(device, batch=1),
        "empty batch": attend_sample(device, batch=0),
    }


def merge_samples(device):
    return {
        f"{tuple(shape)} {dtype}": (
            randn(shape, dtype, device),
            randn(shape[:-1], device=device, seed=1),
        )
        for shape in ((1, 5, 64), (3, 2, 4, 50, 64), (2, 0, 64), (4, 2, 7, 128))
        for dtype in DTYPES[device][:2]
    }


def select_samples(device):
    scores = randn((2, 3, 4, 6), device=device)
    tail = (1, 1, 0, True)  # min_blocks, sink_blocks, local_blocks, diagonal
    seqlens = (256, 384, 64, 64)
    wide = randn((2, 3, 4, 12), device=device)[..., :6]
    return {
        "topk": (scores, *seqlens, 2, None, None, *tail, False, -1, -1),
        "topk causal": (scores, *seqlens, 2, None, None, *tail, True, -1, -1),
        "topk above nK": (scores, *seqlens, 99, None, None, *tail, False, -1, -1),
        "fraction": (scores, *seqlens, None, 0.3, None, *tail, True, -1, -1),
        "fraction 0": (scores, *seqlens, None, 0.0, None, 0, 0, 0, False, False, -1, -1),
        "top_p": (scores, *seqlens, None, None, 0.8, *tail, True, -1, -1),
        "window": (scores, *seqlens, 2, None, None, *tail, False, 100, 3),
        "strided": (wide, *seqlens, 2, None, None, *tail, False, -1, -1),
        "transposed": (bshd(scores), *seqlens, None, 0.5, None, *tail, False, -1, -1),
        "ragged": (scores, 250, 330, 64, 64, 3, None, None, 2, 0, 2, True, True, -1, -1),
        "empty": (scores[:0], *seqlens, 2, None, None, *tail, False, -1, -1),
    }


SAMPLES = {"attend": attend_samples, "merge_states": merge_samples, "select_blocks": select_samples}
NAMES = [(op, name) for op, make in SAMPLES.items() for name in make("cpu")]


@pytest.mark.parametrize(("op", "name"), NAMES, ids=[f"{op}-{name}" for op, name in NAMES])
def test_opcheck(device, op, name):
    samples = SAMPLES[op](device)
    if name not in samples:
        pytest.skip(f"the sample's dtype is not computed on {device}")
    torch.library.opcheck(getattr(ops, op).default, samples[name])


@pytest.mark.parametrize(("op", "name"), NAMES, ids=[f"{op}-{name}" for op, name in NAMES])
def test_fake_results_have_the_real_strides(device, op, name):
    samples = SAMPLES[op](device)
    if name not in samples:
        pytest.skip(f"the sample's dtype is not computed on {device}")
    real = getattr(ops, op)(*samples[name])
    with torch._subclasses.FakeTensorMode() as mode:
        arguments = [
            mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in samples[name]
        ]
        fake = getattr(ops, op)(*arguments)
    for have, want in zip(fake, real, strict=True):
        assert have.shape == want.shape and have.dtype == want.dtype
        assert have.stride() == want.stride() and have.device == want.device


def pipeline(q, k, v, sink):
    """Every public function once, with Python around them."""
    index = attnsieve.select_blocks(q, k, fraction=0.5, causal=True)
    out, lse = attnsieve.block_sparse_attention(
        q, k, v, index, causal=True, sink=sink, return_lse=True
    )
    again, again_lse, counters = attnsieve.threshold_attention(
        q, k, v, 0.01, index=index, causal=True, return_lse=True, return_counters=True
    )
    merged = attnsieve.merge_states(torch.stack([out, again]), torch.stack([lse, again_lse]))
    return (*merged, index.counts, index.columns, counters)


def arguments(device, seqlen_q=130, seqlen_k=200, layout=lambda x: x):
    problem = build(Case(device, seqlen_q, seqlen_k, dtype=DTYPES[device][0], sink=True))
    return *(layout(x) for x in problem.args[:3]), problem.options["sink"]


@pytest.mark.parametrize("layout", [None, bshd], ids=["contiguous", "bshd"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(device, dynamic, layout):
    """aot_eager: tracing, fake kernels and functionalisation are ours; codegen is torch's."""
    torch._dynamo.reset()
    compiled = torch.compile(pipeline, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlens in ((130, 200), (65, 300)):
        args = arguments(device, *seqlens, layout or (lambda x: x))
        expected = pipeline(*args)
        for have, want in zip(compiled(*args), expected, strict=True):
            assert have.stride() == want.stride()
            if want.dtype.is_floating_point:
                torch.testing.assert_close(have, want, rtol=2**-7, atol=2**-8)
            else:
                assert_bitwise(have, want, "lists and counters")


def test_compile_with_an_index_argument(device):
    def attend(q, k, v, index):
        return attnsieve.block_sparse_attention(q, k, v, index, causal=True)

    torch._dynamo.reset()
    problem = build(Case(device, 130, 200, dtype=DTYPES[device][0], density=0.5))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(*problem.args), attend(*problem.args), "index argument")


def test_compile_with_pages(device):
    def attend(q, k, v, block_table, seq_lens):
        pages = dict(block_table=block_table, seq_lens=seq_lens)
        return attnsieve.block_sparse_attention(q, k, v, causal=True, return_lse=True, **pages)

    torch._dynamo.reset()
    case = Case(device, 130, 200, dtype=DTYPES[device][0], layout="paged")
    problem = build_layout(case)
    pages = [problem.options[name] for name in ("block_table", "seq_lens")]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    args = (*problem.args[:3], *pages)
    assert_bitwise(compiled(*args), attend(*args), "pages")


def test_compile_that_builds_an_index(device):
    def attend(q, k, v, mask):
        index = BlockIndex.from_dense(mask, 64, 64)
        return attnsieve.block_sparse_attention(q, k, v, index), index

    torch._dynamo.reset()
    problem = build(Case(device, 130, 200, dtype=DTYPES[device][0], density=0.5))
    mask = problem.index.to_dense(4)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    out, index = compiled(*problem.args[:3], mask)
    assert_bitwise(out, attend(*problem.args[:3], mask)[0], "index from a mask")
    assert isinstance(index, BlockIndex)
    assert_bitwise(index.columns, problem.index.columns, "returned index")


def test_export(device):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v, sink):
            return pipeline(q, k, v, sink)

    args = arguments(device)
    program = torch.export.export(Attention(), args)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {f"attnsieve.{op}.default" for op in SAMPLES} <= called
    for have, want in zip(program.module()(*args), pipeline(*args), strict=True):
        torch.testing.assert_close(have, want, rtol=2**-7, atol=2**-8)


def test_export_with_an_index_argument(device):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v, index):
            return attnsieve.block_sparse_attention(q, k, v, index)

    problem = build(Case(device, 130, 200, dtype=DTYPES[device][0], density=0.5))
    program = torch.export.export(Attention(), problem.args)
    actual = program.module()(*problem.args)
    assert_bitwise(actual, Attention()(*problem.args), "exported")


def test_no_grad_and_inference_mode(device):
    args = arguments(device)
    expected = pipeline(*args)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_bitwise(pipeline(*args), expected, mode.__name__)
