"""What every op promises, for estimate_block_scores, select_marked and the attention on them.

Schemas, opcheck, fake kernels, compile, export; strides, memory around operands, malformed calls.
"""

import dataclasses

import pytest
import torch

import attnsieve
from cases import DTYPES, randn
from numerics import assert_bitwise

ops = torch.ops.attnsieve

SCHEMAS = {
    "estimate_block_scores": "attnsieve::estimate_block_scores(Tensor q_codes, Tensor q_scales, "
    "int q_scale_rows, int q_block_rows, Tensor k_codes, Tensor k_scales, int k_scale_rows, "
    "int k_block_rows, Tensor? threshold, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "int seqlen_q, int seqlen_k, int block_q, int block_k, int row_stride, int key_pool, bool sum, "
    "bool bits, float softmax_scale, bool causal, int window_left, int window_right) "
    "-> Tensor scores",
    "select_marked": "attnsieve::select_marked(Tensor bits, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, int seqlen_q, int seqlen_k, int block_q, int block_k, int? capacity, "
    "int sink_blocks, int local_blocks, bool diagonal, bool causal, int window_left, "
    "int window_right) -> (Tensor counts, Tensor columns)",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    """A graph saved by an older version must still load: change this snapshot knowingly."""
    schema = getattr(ops, name).default._schema
    snapshot = torch._C.parse_schema(SCHEMAS[name])
    assert schema.is_backward_compatible_with(snapshot), f"{schema}\nagainst\n{snapshot}"


def coded(device, heads=4, rows=130, keys=200, bits=8, cu=None, **of_k):
    shapes = ((heads, rows), (2, keys))
    make = [randn((2, h, n, 64), device=device, seed=n) for h, n in shapes]
    if cu is not None:
        make = [x[0].transpose(0, 1).contiguous() for x in make]
    q = attnsieve.quantize_blocks(make[0], cu_seqlens=cu)
    k = attnsieve.quantize_blocks(
        make[1], bits=bits, cu_seqlens=cu, **(dict(scale_rows="key_quads") | of_k)
    )
    return q, k


def estimate_sample(device, q=None, k=None, **change):
    if q is None:
        q, k = coded(device)
    kinds = {1: (0, 1), "key_quads": (2, 1), 16: (0, 16)}
    arguments = dict(
        q=(q.codes, q.scales, *kinds[q.scale_rows]),
        k=(k.codes, k.scales, *kinds[k.scale_rows]),
        threshold=None,
        cu_seqlens_q=q.cu_seqlens,
        cu_seqlens_k=k.cu_seqlens,
        seqlen_q=130,
        seqlen_k=200,
        block_q=64,
        block_k=32,
        row_stride=1,
        key_pool=1,
        sum=False,
        bits=False,
        softmax_scale=0.125,
        causal=True,
        window_left=-1,
        window_right=-1,
    )
    values = (arguments | change).values()
    return tuple(x for value in values for x in (value if isinstance(value, tuple) else (value,)))


def estimate_samples(device):
    limits = randn((2, 4, 130), device=device)
    cu = torch.tensor([0, 60, 60, 130], dtype=torch.int32, device=device)
    packed = coded(device, keys=130, cu=cu)
    empty = coded(device, rows=0)
    return {
        "maxima": estimate_sample(device, threshold=limits),
        "bits": estimate_sample(device, bits=True, block_k=16, row_stride=4),
        "sums": estimate_sample(device, sum=True, threshold=limits[:, :1].expand(2, 4, 130)),
        "4 bits": estimate_sample(device, *coded(device, bits=4), window_left=50),
        "blocks": estimate_sample(device, *coded(device, scale_rows=16), block_q=128, block_k=128),
        "pooled": estimate_sample(device, seqlen_k=799, key_pool=4),
        "packed": estimate_sample(device, *packed, seqlen_q=70, seqlen_k=70),
        "packed bits": estimate_sample(device, *packed, seqlen_q=70, seqlen_k=70, bits=True),
        "no rows": estimate_sample(device, *empty, seqlen_q=0),
    }


def marked_samples(device):
    bits = torch.randint(-(2**31), 2**31, (2, 3, 4, 2), device=device, dtype=torch.int64).int()
    cu = torch.tensor([0, 100, 356], dtype=torch.int32, device=device)
    tail = (1, 2, True, True, -1, -1)  # sink_blocks, local_blocks, diagonal, causal, window
    return {
        "all": (bits, None, None, 256, 600, 64, 16, None, *tail),
        "capacity": (bits, None, None, 256, 600, 64, 16, 7, *tail),
        "window": (bits, None, None, 250, 600, 64, 16, None, 0, 0, False, False, 90, 3),
        "packed": (bits, cu, cu, 256, 600, 64, 16, 99, *tail),
        "empty": (bits[:0], None, None, 256, 600, 64, 16, None, *tail),
    }


SAMPLES = {"estimate_block_scores": estimate_samples, "select_marked": marked_samples}
NAMES = [(op, name) for op, make in SAMPLES.items() for name in make("cpu")]


def leaves(results):
    return torch.utils._pytree.tree_leaves(results)


@pytest.mark.parametrize(("op", "name"), NAMES)
def test_opcheck(device, op, name):
    torch.library.opcheck(getattr(ops, op).default, SAMPLES[op](device)[name])


@pytest.mark.parametrize(("op", "name"), NAMES)
def test_fake_results_have_the_real_strides(device, op, name):
    sample = SAMPLES[op](device)[name]
    real = getattr(ops, op)(*sample)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in sample]
        fake = getattr(ops, op)(*fakes)
    for have, want in zip(leaves(fake), leaves(real), strict=True):
        assert (have.shape, have.dtype) == (want.shape, want.dtype)
        assert have.stride() == want.stride() and have.device == want.device


def pipeline(q, k, v):
    """Each public function of the family once."""
    out, lse, index = attnsieve.quantized_estimate_attention(
        q, k, v, tau=0.3, block_k=16, local_tokens=64, return_lse=True, return_index=True
    )
    coded_q = attnsieve.quantize_blocks(q, smooth=False)
    coded_k = attnsieve.quantize_blocks(k, scale_rows=16)
    masses = attnsieve.estimate_block_scores(
        coded_q, coded_k, threshold=lse, reduce="sum", causal=True, reduce_group=True
    )
    best = attnsieve.select_from_scores(masses, q.shape[2], k.shape[2], topk=2, causal=True)
    return out, lse, index.counts, index.columns, masses, best.counts, best.columns


def inputs(device, rows=330):
    return [randn((2, h, rows, 64), DTYPES[device][0], device, seed=h) for h in (4, 2, 2)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(device, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(pipeline, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (330, 200):
        args = inputs(device, rows)
        for have, want in zip(compiled(*args), pipeline(*args), strict=True):
            assert_bitwise(have, want, "compiled")


def test_export(device):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return pipeline(q, k, v)

    args = tuple(inputs(device))
    program = torch.export.export(Attention(), args)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {f"attnsieve.{op}.default" for op in SAMPLES} <= called
    for have, want in zip(program.module()(*args), pipeline(*args), strict=True):
        assert_bitwise(have, want, "exported")


def moved(x, how):
    """The same numbers: heads inside rows, or rows far apart with other bytes in between."""
    if how == "bshd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    sizes = [n + 1 for n in x.shape[:-1]] + [x.shape[-1] + 64]
    big = torch.full(sizes, 77, dtype=x.dtype, device=x.device)
    return big[tuple(slice(0, n) for n in x.shape)].copy_(x)


@pytest.mark.parametrize("how", ["bshd", "padded"])
@pytest.mark.parametrize("bits", [4, 8])
def test_strides(device, how, bits):
    q, k = coded(device, bits=bits)
    limits = randn((2, 4, 130), device=device)
    options = dict(threshold=limits, causal=True, block_k=32)
    expected = attnsieve.estimate_block_scores(q, k, **options)
    for x in ("q", "k"):
        rows = dict(q=q, k=k)
        rows[x] = dataclasses.replace(rows[x], codes=moved(rows[x].codes, how))
        assert_bitwise(attnsieve.estimate_block_scores(**rows, **options), expected, x)
    options["threshold"] = limits.transpose(1, 2).contiguous().transpose(1, 2)
    assert_bitwise(attnsieve.estimate_block_scores(q, k, **options), expected, "threshold")


def padded(x, fill):
    """x in the middle of memory full of ``fill``."""
    flat = torch.full((x.numel() + 2048,), fill, dtype=x.dtype, device=x.device)
    view = flat[1024 : 1024 + x.numel()].view(x.shape)
    view.copy_(x)
    return view


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_memory_around_operands_does_not_matter(device, bits, reduce):
    q, k = coded(device, bits=bits)
    limits = 5 + randn((2, 4, 130), device=device)
    options = dict(causal=True, block_k=16, row_stride=2, reduce=reduce)
    expected = attnsieve.estimate_block_scores(q, k, threshold=limits, **options)
    assert torch.isfinite(expected[..., :1]).all()
    surrounded = [
        dataclasses.replace(
            rows, codes=padded(rows.codes, 127), scales=padded(rows.scales, float("nan"))
        )
        for rows in (q, k)
    ]
    found = attnsieve.estimate_block_scores(
        *surrounded, threshold=padded(limits, float("nan")), **options
    )
    assert_bitwise(found, expected, "surrounded")


def test_rows_and_keys_that_nobody_sees_do_not_matter(device):
    """Thresholds of rows that are not sampled; keys behind every row."""
    q, k = coded(device, rows=70, keys=330)
    limits = torch.zeros((2, 4, 70), device=device)
    options = dict(row_stride=8, block_k=16, window=(-1, 0))
    expected = attnsieve.estimate_block_scores(q, k, threshold=limits, **options)
    limits[:, :, 1::8] = float("nan")
    found = attnsieve.estimate_block_scores(q, k, threshold=limits, **options)
    assert_bitwise(found, expected, "rows in between")
    early = dataclasses.replace(q, codes=q.codes[:, :, :8], scales=q.scales[:, :, :8].contiguous())
    options["window"] = (20, 0)  # rows 0 .. 7 of 8 see keys 302 .. 329
    expected = attnsieve.estimate_block_scores(early, k, **options)
    codes = k.codes.clone()
    codes[:, :, :302] = 127
    hidden = dataclasses.replace(k, codes=codes)
    assert_bitwise(attnsieve.estimate_block_scores(early, hidden, **options), expected, "hidden")


def test_batch_neighbours_do_not_matter(device):
    args = inputs(device)
    options = dict(tau=0.3, block_k=16, local_tokens=64, return_lse=True)
    out, lse = attnsieve.quantized_estimate_attention(*args, **options)
    for b in range(2):
        own = (x[b : b + 1] for x in args)
        alone = attnsieve.quantized_estimate_attention(*own, **options)
        assert_bitwise(alone, (out[b : b + 1], lse[b : b + 1]), f"sequence {b}")


MALFORMED = (ValueError, TypeError, RuntimeError)


def part(rows, at):
    return dataclasses.replace(rows, codes=rows.codes[at], scales=rows.scales[at].contiguous())


@pytest.mark.parametrize(
    "name, change",
    [
        ("q_codes", lambda q, k: (dataclasses.replace(q, codes=q.codes.int()), k)),
        ("k_codes", lambda q, k: (q, dataclasses.replace(k, codes=k.codes[..., :32]))),
        ("k_codes", lambda q, k: (q, part(k, slice(1)))),
        ("q_codes", lambda q, k: (part(q, (slice(None), slice(3))), k)),
        ("q_scales", lambda q, k: (dataclasses.replace(q, scales=q.scales[..., 1:]), k)),
        ("k_scales", lambda q, k: (q, dataclasses.replace(k, scales=k.scales.double()))),
        ("k_scales", lambda q, k: (q, dataclasses.replace(k, scales=k.scales[:, :1]))),
        ("k_scales", lambda q, k: (q, dataclasses.replace(k, scales=moved(k.scales, "padded")))),
        ("k: expected", lambda q, k: (q, k.codes)),
    ],
    ids=range(9),
)
def test_malformed_operands_are_named(device, name, change):
    with pytest.raises(MALFORMED, match=name):
        attnsieve.estimate_block_scores(*change(*coded(device)))


def test_malformed_sequences_are_named(device):
    cu = torch.tensor([0, 60, 130], dtype=torch.int32, device=device)
    q, k = coded(device, keys=130, cu=cu)
    lengths = dict(max_seqlen_q=70, max_seqlen_k=70)
    with pytest.raises(MALFORMED, match="max_seqlen_k"):
        attnsieve.estimate_block_scores(q, k, max_seqlen_q=70)
    with pytest.raises(MALFORMED, match="cu_seqlens_k"):
        attnsieve.estimate_block_scores(q, dataclasses.replace(k, cu_seqlens=None), **lengths)
    with pytest.raises(MALFORMED, match="cu_seqlens_k"):
        other = dataclasses.replace(k, cu_seqlens=cu.long())
        attnsieve.estimate_block_scores(q, other, **lengths)
    with pytest.raises(MALFORMED, match="threshold"):
        limits = torch.zeros(1, 4, 130, device=device)
        attnsieve.estimate_block_scores(q, k, threshold=limits, **lengths)
    with pytest.raises(NotImplementedError, match="key_pool"):
        attnsieve.estimate_block_scores(q, k, key_pool=2, **lengths)
    bits = torch.zeros(2, 3, 2, 1, dtype=torch.int32, device=device)
    with pytest.raises(MALFORMED, match="cu_seqlens_k"):
        attnsieve.select_marked(bits, 70, 70, cu_seqlens_q=cu)
    with pytest.raises(MALFORMED, match="cu_seqlens_q"):
        attnsieve.select_marked(bits, 70, 70, cu_seqlens_q=cu[:2], cu_seqlens_k=cu[:2])
    with pytest.raises(MALFORMED, match="capacity"):
        attnsieve.select_marked(bits, 70, 70, capacity=-1)
    for wrong in (bits.long(), bits[..., :0], bits[0], bits[:, :, :1]):
        with pytest.raises(MALFORMED, match="bits"):
            attnsieve.select_marked(wrong, 70, 70)


def test_lengths_that_lie_stay_within_the_tensors(device):
    """cu_seqlens beyond the tokens, descending, longer than max_seqlen: no access leaves."""
    cu = torch.tensor([0, 60, 130], dtype=torch.int32, device=device)
    q, k = coded(device, keys=130, cu=cu)
    for wrong in ([0, 60, 10**6], [0, 200, 130], [-50, 60, 130], [0, 130, 0]):
        bad = torch.tensor(wrong, dtype=torch.int32, device=device)
        found = attnsieve.estimate_block_scores(
            dataclasses.replace(q, cu_seqlens=bad),
            dataclasses.replace(k, cu_seqlens=bad),
            max_seqlen_q=70,
            max_seqlen_k=70,
            causal=True,
        )
        assert found.shape == (2, 4, 2, 2)


def test_gradients_are_refused():
    q, k, v = inputs("cpu")
    q.requires_grad_()
    with pytest.raises((NotImplementedError, RuntimeError), match="(?i)backward|grad|derivative"):
        attnsieve.quantized_estimate_attention(q, k, v, tau=0.1).sum().backward()
