"""The ops of the decode and estimate families are good torch citizens."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

import attnsieve
from attnsieve import TokenIndex
from cache_ops import CacheOps
from cases import randn
from numerics import assert_bitwise

ops = torch.ops.attnsieve

SCHEMAS = {
    "decode": "attnsieve::decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? block_table, "
    "Tensor? seq_lens, Tensor? indices, Tensor? counts, int index_page_size, bool physical, "
    "Tensor? dense_begin, int recent, Tensor? sink, Tensor? k_scale, Tensor? v_scale, "
    "float softmax_scale, bool causal, int num_splits) -> (Tensor out, Tensor lse)",
    "threshold_decode": "attnsieve::threshold_decode(Tensor q, Tensor k_cache, Tensor v_cache, "
    "Tensor? block_table, Tensor? seq_lens, Tensor? sink, Tensor? k_scale, Tensor? v_scale, "
    "float? threshold, Tensor? threshold_per_head, int skip_block, int num_splits, "
    "float softmax_scale, bool causal) -> (Tensor out, Tensor lse, Tensor counters)",
    "select_topk": "attnsieve::select_topk(Tensor scores, Tensor? seq_lens, int k, int page_size, "
    "int sink, int recent, bool causal, Tensor? block_table, int table_page_size, int num_pages) "
    "-> (Tensor indices, Tensor counts)",
    "select_threshold": "attnsieve::select_threshold(Tensor scores, Tensor? seq_lens, "
    "float? threshold, Tensor? threshold_per_head, int capacity, int page_size, int sink, "
    "int recent, bool causal, Tensor? block_table, int table_page_size, int num_pages) "
    "-> (Tensor indices, Tensor counts, Tensor passed)",
    "proxy_scores": "attnsieve::proxy_scores(Tensor q, Tensor keys, Tensor? key_scale, "
    "Tensor? projection, Tensor? block_table, Tensor? seq_lens, int element, int row_reduce, "
    "bool softmax, int head_reduce, int num_out_heads, Tensor? head_weights, int page_reduce, "
    "int page_size, "
    "int skip_first, int skip_last, bool causal, float score_scale) -> Tensor scores",
    "append_kv": "attnsieve::append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor? block_table, Tensor? seq_lens, Tensor? cu_seqlens, Tensor? k_scale, Tensor? v_scale, "
    "Tensor(c!)? bounds, int bounds_page_size, Tensor? projection, Tensor(d!)? proxy) -> ()",
    "quantize_blocks": "attnsieve::quantize_blocks(Tensor x, Tensor? cu_seqlens, int bits, "
    "int scale_rows, int block_rows, bool smooth, Tensor(a!)? smoothed=None) "
    "-> (Tensor codes, Tensor scales, Tensor mean)",
    "fetch_tokens": "attnsieve::fetch_tokens(Tensor indices, Tensor counts, Tensor k, Tensor v, "
    "Tensor(a!) slots, Tensor(b!) k_slots, Tensor(c!) v_slots, Tensor? first_new, "
    "Tensor(d!)? moved) -> Tensor positions",
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
    ends, float8 = (None, None, 0.125, True, 0), [x.to(torch.float8_e4m3fn) for x in (k, v)]
    return {
        "everything": (q, k, v, None, None, *everything, *ends),
        "bshd": (*bshd, None, lens, *everything, None, None, 0.125, False, 3),
        "paged": (q, *pages, table, lens, *everything, *ends),
        "float8": (q, *float8, None, lens, *everything, torch.ones(2), torch.ones(2), 0.1, True, 0),
        "tokens": (q, k, v, None, lens, lists, counts, 1, False, None, 2, None, *ends),
        "rows": (q, k, v, None, lens, rows, None, 1, False, lens - 3, 0, None, *ends),
        "pages": (q, *pages, table, lens, lists, counts, 4, False, None, 0, q[0, :, 0, 0].clone())
        + ends,
        "slots": (q, *pages, table, lens, lists, counts, 1, True, None, 0, None, *ends),
        "empty": (q[:0], k[:0], v[:0], None, None, *everything, *ends),
    }


def threshold_decode_samples():
    q, k, v = (randn((2, h, n, 64), seed=h) for h, n in ((4, 3), (2, 200), (2, 200)))
    bshd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    pages = [x[:, :, :192].reshape(24, 16, 2, 64) for x in (k, v)]
    table = torch.arange(24, dtype=torch.int32).view(2, 12)
    lens = torch.tensor([200, 70], dtype=torch.int32)
    float8, scales = [x.to(torch.float8_e4m3fn) for x in (k, v)], (torch.ones(2), torch.ones(2))
    sink, lambdas, none = torch.zeros(4), torch.full((2, 1), 0.1).expand(2, 4), (None, None, None)
    ends = (0.125, True)
    return {
        "number": (q, k, v, None, None, *none, 0.1, None, 128, 1, *ends),
        "bshd": (*bshd, None, lens, sink, None, None, None, lambdas, 64, 3, 0.125, False),
        "paged": (q, *pages, table, lens, *none, None, lambdas, 64, 2, *ends),
        "float8": (q, *float8, None, lens, None, *scales, 0.1, None, 64, 2, *ends),
        "empty": (q[:0], k[:0], v[:0], None, None, *none, 0.1, None, 128, 4, *ends),
    }


def proxy_samples():
    q, k = randn((2, 4, 3, 64)), randn((2, 2, 48, 64), seed=1)
    pages, table = k.reshape(6, 16, 2, 64), torch.tensor([[3, 1, -1], [0, 2, 5]]).int()
    lens, per_row = torch.tensor([20, 48], dtype=torch.int32), randn((2, 4, 3), seed=2)
    bounds = torch.stack([pages.amin(1), pages.amax(1)], 2)
    plain, ends = (0, 0, False, 0, 4, None, 0, 1), (0, 0, False, 0.125)
    bshd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    codes = (k * 20).to(torch.int8), randn((2, 2, 48), seed=3)
    to_proxies = randn((2, 64, 16), seed=4)
    return {
        "dots": (q, k, None, None, None, None, *plain, *ends),
        "bshd": (*bshd, None, None, None, lens, *plain, *ends),
        "codes": (q, *codes, None, None, lens, *plain, *ends),
        "paged": (
            q,
            pages,
            None,
            None,
            table,
            lens,
            1,
            3,
            True,
            2,
            2,
            per_row,
            3,
            5,
            1,
            2,
            True,
            1.0,
        ),
        "bounds": (
            q,
            bounds,
            None,
            None,
            table,
            lens,
            2,
            0,
            False,
            1,
            1,
            None,
            0,
            16,
            0,
            1,
            True,
            1.0,
        ),
        "rows": (q, k, None, None, None, lens, 0, 1, False, 0, 4, per_row[0, :, 0], 1, 48, *ends),
        "projected": (q, k[..., :16].contiguous(), None, to_proxies, None, lens, *plain, *ends),
        "empty": (q[:0], k[:0], None, None, None, None, *plain, *ends),
    }


def append_samples():
    k, v = randn((2, 2, 3, 64)), randn((2, 2, 3, 64), seed=1)
    lens, table = torch.tensor([3, 20]).int(), torch.tensor([[3, 1, -1], [0, 2, 5]]).int()
    caches = [torch.zeros(2, 2, 48, 64) for _ in range(2)]
    pages = [torch.zeros(6, 16, 2, 64) for _ in range(2)]
    plain, none = (None, None), (None, 1, None, None)
    projection, bounds = randn((4, 64, 8), seed=2), torch.zeros(6, 2, 2, 64)
    packed, proxy = randn((5, 2, 64)), torch.zeros(6, 16, 4, 8)
    offsets, scales = torch.tensor([0, 1, 5]).int(), (torch.ones(2), torch.ones(2))
    float8 = [x.to(torch.float8_e4m3fn) for x in caches]
    return {
        "contiguous": (k, v, *caches, None, lens, None, *plain, *none),
        "paged": (k, v, *pages, table, lens, None, *plain, bounds, 16, projection, proxy),
        "bounds": (k, v, *caches, None, lens, None, *plain, randn((2, 3, 2, 2, 64)), 16, None)
        + (None,),
        "packed": (packed, packed, *pages, table, lens, offsets, *plain, *none),
        "float8": (k, v, *float8, None, lens, None, *scales, *none),
        "empty": (k[:0], v[:0], *(x[:0] for x in caches), None, lens[:0], None, *plain, *none),
    }


def quantize_samples():
    x = randn((2, 3, 70, 64))
    bshd = x.transpose(1, 2).contiguous().transpose(1, 2)
    offsets = torch.tensor([0, 0, 33, 70], dtype=torch.int32)
    return {
        "rows": (x, None, 8, 0, 1, True),
        "blocks": (bshd, None, 8, 0, 64, False),
        "smoothed rows": (bshd, None, 8, 0, 64, True, torch.empty_like(bshd)),
        "4 bits": (x.bfloat16(), None, 4, 1, 1, True),
        "packed": (x[0].transpose(0, 1), offsets, 8, 2, 1, True),
        "packed rows": (x[0].transpose(0, 1).contiguous(), offsets, 4, 0, 1, False),
        "no rows": (x[:, :, :0], None, 8, 0, 16, True),
        "empty": (x[:0], None, 8, 0, 1, True),
    }


def fetch_samples():
    both = randn((2, 3, 50, 2, 64))  # keys and values side by side
    caches = both[..., 0, :], both[..., 1, :]
    indices = torch.arange(0, 40, 8).expand(2, 3, -1).int().contiguous()
    lists = indices, torch.tensor([[5, 0, 3], [1, 5, 5]]).int()
    slots = torch.full((2, 3, 8), -1).int()
    slots[0] = torch.tensor([16, 3, 0, -1, 49, 8, 4, 1])
    sets = slots, *(torch.zeros(2, 3, 8, 64) for _ in range(2))
    return {
        "lists": (*lists, *caches, *sets, None, None),
        "new tokens, counters": (
            *(*lists, *caches, *sets, torch.tensor([5, 50]).int()),
            torch.zeros(2, dtype=torch.int64),
        ),
        "empty": (*(x.new_empty(0, *x.shape[1:]) for x in lists + caches + sets), None, None),
    }


SAMPLES = {
    "decode": decode_samples(),
    "threshold_decode": threshold_decode_samples(),
    "proxy_scores": proxy_samples(),
    "append_kv": append_samples(),
    "quantize_blocks": quantize_samples(),
    "fetch_tokens": fetch_samples(),
    "select_topk": topk_samples(),
    "select_threshold": threshold_samples(),
}
NAMES = [(op, name) for op, made in SAMPLES.items() for name in made]


def sample_of(op, name, device):
    sample = SAMPLES[op][name]
    if device != "cpu" and op in (
        "decode",
        "threshold_decode",
    ):  # q and the caches; float32 is the CPU's alone
        halves = (x.half() if x.dtype == torch.float32 else x for x in sample[:3])
        sample = (*halves, *sample[3:])
    return tree_map_only(torch.Tensor, CacheOps(device).to_device, sample)


@pytest.mark.parametrize(("op", "name"), NAMES)
def test_opcheck(op, name, device):
    checks = ["test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"]
    if name != "float8":  # torch's check of what was written has no float8 on the CPU
        checks.append("test_schema")
    sample = sample_of(op, name, device)
    torch.library.opcheck(getattr(ops, op).default, sample, test_utils=checks)


@pytest.mark.parametrize(("op", "name"), NAMES)
def test_fake_results_have_the_real_strides(op, name, device):
    sample = sample_of(op, name, device)
    real = getattr(ops, op)(*sample)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in sample]
        fake = getattr(ops, op)(*fakes)
    for have, want in zip(leaves(fake), leaves(real), strict=True):
        if want is None:
            assert have is None
            continue
        assert (have.shape, have.dtype) == (want.shape, want.dtype)
        assert have.stride() == want.stride() and have.device == want.device


def choose(scores, seq_lens, limits, q, k):
    bounds = torch.zeros(2, -(-k.shape[2] // 16), 3, 2, 64)
    cache = torch.zeros_like(k), torch.zeros_like(k)
    attnsieve.append_kv(k, k, *cache, seq_lens=seq_lens, bounds=bounds, page_size=16)
    pages = attnsieve.proxy_scores(q, bounds, element="bounds", seq_lens=seq_lens, page_size=16)
    best = attnsieve.select_topk(scores, 8, seq_lens=seq_lens, recent=1)
    above, passed = attnsieve.select_threshold(scores, limits, 8, seq_lens=seq_lens)
    out, lse = attnsieve.decode(q, k, k, best, seq_lens=seq_lens, recent=2, return_lse=True)
    whole, kept = attnsieve.topk_attention(
        q, k, k, k=16, score="exact", seq_lens=seq_lens, return_index=True
    )
    skip = dict(phase="decode", seq_lens=seq_lens, return_lse=True, return_counters=True)
    skipping = [
        attnsieve.threshold_attention(q, k, k, 0.5, two_phase=two_phase, **skip)
        for two_phase in (False, True)
    ]
    coded = attnsieve.quantize_blocks(k, scale_rows=16)
    codes = (coded.codes, coded.scales, coded.mean)
    held = attnsieve.WorkingSet(2, 3, 8, 64, dtype=k.dtype, device=k.device)
    slots = held.fetch(best, k, k, first_new=seq_lens), held.slots, held.k, held.moved
    return best, above, passed, out, lse, pages, *cache, bounds, whole, kept, skipping, codes, slots


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
