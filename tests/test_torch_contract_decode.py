"""The ops of the decode family are good torch citizens. CPU only: they have no CUDA kernels yet."""

import pytest
import torch

import attnsieve
from attnsieve import TokenIndex
from cases import randn
from numerics import assert_bitwise

ops = torch.ops.attnsieve

SCHEMAS = {
    "decode": "attnsieve::decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? block_table, "
    "Tensor? seq_lens, Tensor? indices, Tensor? counts, int index_page_size, bool physical, "
    "Tensor? dense_begin, int recent, Tensor? sink, float softmax_scale, bool causal) "
    "-> (Tensor out, Tensor lse)",
    "select_topk": "attnsieve::select_topk(Tensor scores, Tensor? seq_lens, int k, int page_size, "
    "int sink, int recent, bool causal, Tensor? block_table, int table_page_size, int num_pages) "
    "-> (Tensor indices, Tensor counts)",
    "select_threshold": "attnsieve::select_threshold(Tensor scores, Tensor? seq_lens, "
    "float? threshold, Tensor? threshold_per_head, int capacity, int page_size, int sink, "
    "int recent, bool causal, Tensor? block_table, int table_page_size, int num_pages) "
    "-> (Tensor indices, Tensor counts, Tensor passed)",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    schema = getattr(ops, name).default._schema
    snapshot = torch._C.parse_schema(SCHEMAS[name])
    assert schema.is_backward_compatible_with(snapshot), f"{schema}\nagainst\n{snapshot}"


def topk_samples():
    scores = randn((2, 3, 50))
    lens = torch.tensor([50, 20], dtype=torch.int32)
    table = torch.arange(14, dtype=torch.int32).view(2, 7)
    rows = randn((2, 4, 3, 60))[..., :50]
    return {
        "plain": (scores, None, 8, 1, 0, 0, False, None, 1, 0),
        "lengths": (scores, lens, 8, 1, 1, 2, False, None, 1, 0),
        "pages": (scores, lens, 8, 16, 0, 1, False, None, 1, 0),
        "k above N": (scores, None, 99, 1, 0, 0, False, None, 1, 0),
        "rows, strided": (rows, lens, 8, 1, 0, 0, True, None, 1, 0),
        "transposed": (rows.transpose(1, 2), lens, 8, 1, 0, 0, True, None, 1, 0),
        "slots": (scores, lens, 8, 1, 0, 0, False, table, 8, 14),
        "k 0": (scores, None, 0, 1, 0, 0, False, None, 1, 0),
        "empty batch": (scores[:0], None, 8, 1, 0, 0, False, None, 1, 0),
    }


def threshold_samples():
    per_head = torch.zeros(2, 1).expand(2, 3)
    samples = {}
    for name, (scores, lens, *rest) in topk_samples().items():
        own = (0.5, None) if len(name) % 2 else (None, per_head[: scores.shape[0]])
        if "transposed" in name:
            own = (0.5, None)
        samples[name] = (scores, lens, *own, *rest)
    return samples


def decode_samples():
    q, k, v = (randn((2, h, n, 64), seed=h) for h, n in ((4, 3), (2, 48), (2, 48)))
    bshd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    pages = [x.reshape(6, 16, 2, 64) for x in (k, v)]
    table = torch.tensor([[3, 1, -1], [0, 2, 5]], dtype=torch.int32)
    lens = torch.tensor([20, 48], dtype=torch.int32)
    lists = torch.arange(0, 30, 3, dtype=torch.int32).expand(2, 1, 10)
    rows, counts = lists[:, None].expand(2, 3, 1, 10), torch.full((2, 1), 7, dtype=torch.int32)
    everything = (None, None, 1, False, None, 0, None)
    return {
        "everything": (q, k, v, None, None, *everything, 0.125, True),
        "bshd": (*bshd, None, lens, *everything, 0.125, False),
        "paged": (q, *pages, table, lens, *everything, 0.125, True),
        "tokens": (q, k, v, None, lens, lists, counts, 1, False, None, 2, None, 0.1, True),
        "rows": (q, k, v, None, lens, rows, None, 1, False, lens - 3, 0, None, 0.1, True),
        "pages": (q, *pages, table, lens, lists, counts, 4, False, None, 0, q[0, :, 0, 0].clone())
        + (0.1, True),
        "slots": (q, *pages, table, lens, lists, counts, 1, True, None, 0, None, 0.1, True),
        "empty": (q[:0], k[:0], v[:0], None, None, *everything, 0.125, True),
    }


SAMPLES = {
    "decode": decode_samples(),
    "select_topk": topk_samples(),
    "select_threshold": threshold_samples(),
}
NAMES = [(op, name) for op, made in SAMPLES.items() for name in made]


@pytest.mark.parametrize(("op", "name"), NAMES)
def test_opcheck(op, name):
    torch.library.opcheck(getattr(ops, op).default, SAMPLES[op][name])


@pytest.mark.parametrize(("op", "name"), NAMES)
def test_fake_results_have_the_real_strides(op, name):
    real = getattr(ops, op)(*SAMPLES[op][name])
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [
            mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in SAMPLES[op][name]
        ]
        fake = getattr(ops, op)(*fakes)
    for have, want in zip(fake, real, strict=True):
        assert (have.shape, have.dtype) == (want.shape, want.dtype)
        assert have.stride() == want.stride() and have.device == want.device


def choose(scores, seq_lens, limits, q, k):
    best = attnsieve.select_topk(scores, 8, seq_lens=seq_lens, recent=1)
    above, passed = attnsieve.select_threshold(scores, limits, 8, seq_lens=seq_lens)
    out, lse = attnsieve.decode(q, k, k, best, seq_lens=seq_lens, recent=2, return_lse=True)
    return best, above, passed, out, lse


def arguments(columns):
    q, k = randn((2, 6, 2, 64)), randn((2, 3, columns, 64), seed=1)
    return randn((2, 3, columns)), torch.tensor([50, 20]).int(), torch.zeros(2), q, k


def leaves(results):
    return torch.utils._pytree.tree_leaves(results)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(choose, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for columns in (50, 70):
        args = arguments(columns)
        results = compiled(*args)
        assert isinstance(results[0], TokenIndex) and results[0].page_size == 1
        for have, want in zip(leaves(results), leaves(choose(*args)), strict=True):
            assert_bitwise(torch.as_tensor(have), torch.as_tensor(want))


def test_export():
    class Choose(torch.nn.Module):
        def forward(self, scores, seq_lens, limits, q, k):
            return choose(scores, seq_lens, limits, q, k)

    args = arguments(50)
    program = torch.export.export(Choose(), args)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {f"attnsieve.{op}.default" for op in SAMPLES} <= called
    for have, want in zip(leaves(program.module()(*args)), leaves(choose(*args)), strict=True):
        assert_bitwise(torch.as_tensor(have), torch.as_tensor(want))


def test_index_is_checked():
    indices = torch.zeros(2, 3, 4, dtype=torch.int32)
    with pytest.raises(TypeError, match="indices must be int32"):
        TokenIndex(indices.long())
    with pytest.raises(ValueError, match="indices must be"):
        TokenIndex(indices[0])
    with pytest.raises(ValueError, match="counts must be"):
        TokenIndex(indices, torch.zeros(2, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="page_size"):
        TokenIndex(indices, page_size=0)
    good = torch.tensor([[[0, 3, -1, 5], [1, 2, 0, 9]]], dtype=torch.int32)
    counts = torch.tensor([[4, 2]], dtype=torch.int32)
    TokenIndex(good, counts).validate(6)
    with pytest.raises(ValueError, match=r"indices\[0, 0, 3\] = 5"):
        TokenIndex(good, counts).validate(torch.tensor([5]))
    with pytest.raises(ValueError, match=r"indices\[0, 1, 2\] = 0"):
        TokenIndex(good).validate(10)
    with pytest.raises(ValueError, match=r"counts\[0, 1\] = 5"):
        TokenIndex(good, counts + torch.tensor([[0, 3]], dtype=torch.int32)).validate(10)
