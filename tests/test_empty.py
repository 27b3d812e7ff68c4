"""Empty problems return correct empties, on fake tensors too."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attnsieve
from attnsieve import BlockIndex
from cases import DTYPES, randn, random_index

attend = attnsieve.block_sparse_attention
SHAPES = {  # (batch, seqlen_q, seqlen_k)
    "batch": (0, 100, 100),
    "queries": (2, 0, 100),
    "keys": (2, 100, 0),
    "both": (2, 0, 0),
    "all": (0, 0, 0),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("density", [None, 1.0])
@pytest.mark.parametrize("empty", SHAPES)
def test_empty_shapes(device, empty, density, causal):
    batch, seqlen_q, seqlen_k = SHAPES[empty]
    q = randn((batch, 4, seqlen_q, 64), DTYPES[device][0], device)
    k = randn((batch, 2, seqlen_k, 64), DTYPES[device][0], device)
    index = None
    if density is not None:
        index = random_index(batch, 4, seqlen_q, seqlen_k, density=1.0, device=device)
    out, lse = attend(q, k, k, index, causal=causal, return_lse=True)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32
    assert (out == 0).all() and (lse == -math.inf).all()
    *_, counters = attnsieve.threshold_attention(
        q, k, k, 0.1, index=index, causal=causal, return_counters=True
    )
    assert counters.shape == (batch, 4, 2) and (counters == 0).all()


def test_index_without_room(device):
    """Capacity 0 and rows 0 are legal lists of nothing."""
    q = randn((1, 2, 100, 64), DTYPES[device][0], device)
    where = dict(dtype=torch.int32, device=device)
    index = BlockIndex(torch.zeros(1, 2, 2, **where), torch.zeros(1, 2, 2, 0, **where), 64, 64)
    out, lse = attend(q, q, q, index, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()
    index.validate(2)


def test_varlen_without_sequences_or_tokens(device):
    for tokens, starts in ((0, [0]), (0, [0, 0, 0])):
        q = randn((tokens, 2, 64), DTYPES[device][0], device)
        cu = torch.tensor(starts, device=device).int()
        options = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True)
        out, lse = attend(q, q, q, **options)
        assert out.shape == q.shape and lse.shape == (tokens, 2)


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("empty", ["batch", "pages", "table", "lengths", "queries"])
def test_pages_of_nothing(device, empty, index):
    batch, rows = (0 if empty == "batch" else 2), (0 if empty == "queries" else 70)
    num_pages, max_pages = (0 if empty == "pages" else 5), (0 if empty == "table" else 3)
    q = randn((batch, 4, rows, 64), DTYPES[device][0], device)
    k = randn((num_pages, 32, 2, 64), DTYPES[device][0], device)
    pages = dict(
        block_table=torch.zeros(batch, max_pages, dtype=torch.int32, device=device),
        seq_lens=torch.full((batch,), 0 if empty == "lengths" else 80, device=device).int(),
    )
    lists = random_index(batch, 4, rows, 32 * max_pages, density=1.0, device=device)
    out, lse = attend(q, k, k, lists if index else None, **pages, return_lse=True)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert (out == 0).all() and (lse == -math.inf).all()
    flat = q.transpose(1, 2).flatten(0, 1)
    cu = torch.arange(batch + 1, device=device).int() * rows
    out, lse = attend(flat, k, k, **pages, cu_seqlens_q=cu, causal=True, return_lse=True)
    assert out.shape == flat.shape and (out == 0).all() and (lse == -math.inf).all()


def test_selection_of_nothing(device):
    for shape, seqlens in (
        ((0, 2, 2, 3), (100, 150)),
        ((1, 2, 0, 3), (0, 150)),
        ((1, 2, 2, 0), (100, 0)),
    ):
        index = attnsieve.select_from_scores(torch.zeros(shape, device=device), *seqlens, topk=2)
        assert index.counts.shape == shape[:3]
        assert (index.counts == 0).all()


def test_merge_of_nothing(device):
    out, lse = attnsieve.merge_states(
        torch.zeros(3, 0, 64, device=device), torch.zeros(3, 0, device=device)
    )
    assert out.shape == (0, 64) and lse.shape == (0,)


@pytest.mark.parametrize("empty", SHAPES)
def test_fake_tensors(empty):
    batch, seqlen_q, seqlen_k = SHAPES[empty]
    with FakeTensorMode():
        q, k = torch.empty(batch, 4, seqlen_q, 64), torch.empty(batch, 2, seqlen_k, 64)
        out, lse = attend(q, k, k, return_lse=True)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
