"""What only the CPU backend promises: float32, every head_dim it lists, and CUDA's decisions."""

import pytest
import torch

import attnsieve
from cases import Case, build
from numerics import assert_bitwise, check_against_oracle

attend = attnsieve.block_sparse_attention


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(head_dim):
    dtype = (torch.float32, torch.bfloat16, torch.float16)[head_dim // 8 % 3]
    case = Case("cpu", 70, 150, (2, 1), head_dim, dtype, batch=1, causal=True, density=0.7)
    check_against_oracle(attend, build(case), f"{case!r}")


def test_float32_is_float32():
    """Errors near float32's own: nothing on the way is narrower."""
    problem = build(Case("cpu", 200, 300, dtype=torch.float32))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in problem.args[:3]), enable_gqa=True
    )
    torch.testing.assert_close(attend(*problem.args).double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("block", [None, (64, 64), (128, 64), (128, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_agrees(cuda_backend, dtype, block):
    """Same order on both: outputs within rounding, counters and selections equal."""
    case = dict(seqlen_q=300, seqlen_k=500, dtype=dtype, causal=True, seed=8)
    case |= {} if block is None else dict(density=0.5, block=block)
    here, there = build(Case("cpu", **case)), build(Case("cuda", **case))
    results = []
    for problem in (here, there):
        result = attnsieve.threshold_attention(
            *problem.args[:3],
            1e-2,
            index=problem.index,
            return_lse=True,
            return_counters=True,
            **problem.options,
        )
        results.append([x.cpu() for x in result])
    (out, lse, counters), (cuda_out, cuda_lse, cuda_counters) = results
    assert_bitwise(cuda_counters, counters, "counters")
    torch.testing.assert_close(cuda_lse, lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cuda_out, out, rtol=2**-7, atol=2**-8)
    scores = attnsieve.pooled_block_scores(here.q, here.k)
    rules = dict(topk=3, causal=True)
    chosen = attnsieve.select_from_scores(scores, 300, 500, **rules)
    cuda_chosen = attnsieve.select_from_scores(scores.cuda(), 300, 500, **rules)
    assert_bitwise(cuda_chosen.columns.cpu(), chosen.columns, "selection from equal scores")
