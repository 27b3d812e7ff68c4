"""BlockIndex: canonical form, validation, and a lossless way in and out of foreign formats."""

import copy

import pytest
import torch
import torch.utils._pytree as pytree

from attnsieve import BlockIndex, reference
from cases import BLOCKS, DEVICES, cuda_only, random_block_mask, random_index
from numerics import assert_bitwise

SHAPES = ((1, 1, 1, 1), (2, 3, 4, 5), (1, 2, 7, 1), (3, 1, 1, 9), (2, 2, 0, 3), (2, 2, 3, 0))


def messy_index(device="cpu"):
    """Invalid, repeated and unordered ids; counts outside their range. nK = 6."""
    columns = [
        [5, 1, 1, 7],
        [-1, 2, -5, 0],
        [3, 3, 3, 3],
        [6, 2**31 - 1, -(2**31), 4],
        [0, 1, 2, 3],
    ]
    counts = [4, 4, 3, 9, -2]
    columns = torch.tensor(columns, device=device).int()[None, None]
    return BlockIndex(
        columns=columns,
        counts=torch.tensor(counts, device=device).int()[None, None],
        block_q=64,
        block_k=64,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_dense_round_trip(device, shape, density):
    mask = random_block_mask(shape, density).to(device)
    index = BlockIndex.from_dense(mask, 64, 128)
    assert index.counts.shape == shape[:3] and (index.block_q, index.block_k) == (64, 128)
    index.validate(shape[-1])
    assert_bitwise(index.to_dense(shape[-1]), mask, "dense")
    used = torch.arange(index.capacity, device=device) < index.counts.unsqueeze(-1)
    assert (index.columns[~used] == -1).all()


def test_dense_of_fewer_dimensions():
    mask = random_block_mask((4, 5), 0.5)
    assert_bitwise(BlockIndex.from_dense(mask, 64, 64).to_dense(5), mask[None, None], "2-D")
    mask = random_block_mask((3, 4, 5), 0.5)
    assert_bitwise(BlockIndex.from_dense(mask, 64, 64).to_dense(5), mask[None], "3-D")
    with pytest.raises(TypeError, match="mask"):
        BlockIndex.from_dense(mask.float(), 64, 64)
    with pytest.raises(ValueError, match="mask"):
        BlockIndex.from_dense(mask[0, 0], 64, 64)


def test_canonicalize_sorts_drops_and_merges(device):
    index = messy_index(device).canonicalize(6)
    index.validate(6)
    assert index.counts.tolist() == [[[2, 2, 1, 1, 0]]]
    rows = [[1, 5, -1, -1], [0, 2, -1, -1], [3, -1, -1, -1], [4, -1, -1, -1], [-1] * 4]
    assert index.columns.tolist() == [[rows]]
    assert_bitwise(index.to_dense(6), messy_index(device).to_dense(6), "the same blocks")


def test_canonicalize_of_canonical_changes_nothing(device):
    index = random_index(2, 3, 300, 700, density=0.4, device=device)
    again = index.canonicalize(11)
    assert_bitwise((again.counts, again.columns), (index.counts, index.columns), "canonical")


MISTAKES = {
    "count above": ("counts", (1, 2, 1), 99, r"counts\[1, 2, 1\] = 99"),
    "count negative": ("counts", (0, 1, 0), -1, r"counts\[0, 1, 0\] = -1"),
    "id above": ("columns", (1, 0, 2, 3), 6, r"columns\[1, 0, 2, 3\] = 6"),
    "id negative": ("columns", (1, 2, 3, 0), -7, r"columns\[1, 2, 3, 0\] = -7"),
    "repeated": ("columns", (0, 0, 0, 2), 1, r"columns\[0, 0, 0, 2\] = 1.*strictly increasing"),
    "descending": ("columns", (0, 2, 1, 1), 0, r"columns\[0, 2, 1, 1\] = 0.*strictly increasing"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_validate_names_the_first_bad_place(device, mistake):
    field, place, value, message = MISTAKES[mistake]
    index = random_index(2, 3, 256, 384, density=1.0, device=device)
    index.validate(6)
    getattr(index, field)[place] = value
    with pytest.raises(ValueError, match=message):
        index.validate(6)
    index.counts[1, 2, 3] = -5 if mistake != "id negative" else 6
    with pytest.raises(ValueError, match=message):
        index.validate(6)


def test_validate_ignores_entries_past_counts(device):
    index = random_index(1, 2, 200, 384, density=0.5, device=device)
    used = torch.arange(index.capacity, device=device) < index.counts.unsqueeze(-1)
    BlockIndex(index.counts, torch.where(used, index.columns, 999), 64, 64).validate(6)


def test_csr_layout():
    mask = torch.tensor([[[[1, 0, 1], [0, 0, 0]], [[0, 1, 0], [1, 1, 1]]]], dtype=torch.bool)
    indptr, indices = BlockIndex.from_dense(mask, 64, 64).to_csr()
    assert indptr.tolist() == [[[0, 2, 2], [2, 3, 6]]]
    assert indices.tolist() == [0, 2, 1, 0, 1, 2]
    assert (indptr.dtype, indices.dtype) == (torch.int32, torch.int32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_csr_round_trip(device, shape, density):
    mask = random_block_mask(shape, density).to(device)
    indptr, indices = BlockIndex.from_dense(mask, 64, 64).to_csr()
    for dtype in (torch.int32, torch.int64):
        back = BlockIndex.from_csr(indptr.to(dtype), indices.to(dtype), 64, 64)
        back.validate(shape[-1])
        assert_bitwise(back.to_dense(shape[-1]), mask, "csr")
    back = BlockIndex.from_csr(indptr, indices, 64, 64, capacity=2)
    assert back.capacity == 2 and (back.counts <= 2).all()


def test_flashinfer_bsr_round_trip(device):
    mask = random_block_mask((5, 9), 0.4).to(device)
    indptr, indices = BlockIndex.from_dense(mask, 64, 128).to_flashinfer_bsr()
    assert indptr.shape == (6,) and indices.shape == (int(mask.sum()),)
    back = BlockIndex.from_flashinfer_bsr(indptr, indices, 64, 128)
    assert back.counts.shape == (1, 1, 5)
    assert_bitwise(back.to_dense(9)[0, 0], mask, "bsr")
    with pytest.raises(ValueError, match="one pattern"):
        random_index(1, 2, 64, 64).to_flashinfer_bsr()


def test_cudnn_round_trip(device):
    index = random_index(2, 3, 300, 700, density=0.5, device=device)
    columns, counts = index.to_cudnn()
    assert (columns >= 0).all() and columns.dtype == counts.dtype == torch.int32
    back = BlockIndex.from_cudnn(columns, counts, 64, 64)
    assert_bitwise(back.to_dense(11), index.to_dense(11), "cuDNN lists")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlens", [(256, 384), (384, 256), (200, 300)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_flex_round_trip(device, block, seqlens, causal):
    index = random_index(2, 3, *seqlens, block, 0.5, device)
    block_mask = index.to_flex(*seqlens, causal=causal)
    assert block_mask.BLOCK_SIZE == block
    back = BlockIndex.from_flex(block_mask, causal=causal)
    num_k_blocks = -(-seqlens[1] // block[1])
    back.validate(num_k_blocks)
    assert_bitwise(back.to_dense(num_k_blocks), index.to_dense(num_k_blocks), "flex")
    assert (back.block_q, back.block_k) == block


@pytest.mark.parametrize("causal", [False, True])
def test_flex_means_the_same_attention(causal):
    from torch.nn.attention.flex_attention import flex_attention

    q, k = torch.randn(2, 3, 200, 16), torch.randn(2, 3, 300, 16)
    index = random_index(2, 3, 200, 300, density=0.6)
    out = flex_attention(q, k, k, block_mask=index.to_flex(200, 300, causal=causal))
    expected = reference.block_sparse_attention(q, k, k, index, causal=causal)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_flex_masks_made_by_torch():
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    block_mask = create_block_mask(causal, 1, 1, 512, 512, device="cpu", BLOCK_SIZE=128)
    with pytest.raises(ValueError, match="mask_mod"):
        BlockIndex.from_flex(block_mask)
    index = BlockIndex.from_flex(block_mask, causal=True)
    assert_bitwise(index.to_dense(4)[0, 0], torch.ones(4, 4).tril().bool(), "causal blocks")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (70, 20), (0, 0)], ids=str)
@pytest.mark.parametrize("seqlens", [(200, 333), (333, 200), (1, 1)], ids=str)
def test_density_counts_visible_pairs(device, seqlens, window, causal):
    index = random_index(2, 3, *seqlens, (64, 128), 0.5, device)
    times = reference.index_multiplicity(index, 2, 3, *seqlens)
    visible = reference.visible_mask(*seqlens, causal=causal, window=window, device=device)
    expected = (times * visible).sum().double() / (6 * visible.sum()).clamp(min=1)
    density = index.density(*seqlens, causal=causal, window=window)
    assert density.device.type == device and density.shape == ()
    torch.testing.assert_close(density, expected, rtol=1e-12, atol=0)


def test_density_skips_bad_entries(device):
    clean = messy_index(device).canonicalize(6)
    single = BlockIndex(clean.counts, torch.where(clean.columns < 0, 99, clean.columns), 64, 64)
    assert float(single.density(320, 384)) == pytest.approx(6 / 30)


def test_to_moves_both_tensors():
    moved = random_index(1, 2, 200, 300).to("meta")
    assert moved.counts.is_meta and moved.columns.is_meta and moved.block_q == 64


def test_is_immutable_and_a_pytree():
    index = random_index(1, 2, 200, 300, (64, 128))
    with pytest.raises(AttributeError):
        index.block_q = 128
    leaves, spec = pytree.tree_flatten(index)
    assert [leaf.dtype for leaf in leaves] == [torch.int32, torch.int32]
    back = pytree.tree_unflatten(leaves, spec)
    assert (back.block_q, back.block_k) == (64, 128) and back.counts is index.counts
    restored = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert pytree.tree_unflatten(leaves, restored).block_k == 128
    shallow = copy.copy(index)
    assert shallow.columns is index.columns


@cuda_only
def test_no_hidden_host_sync():
    index = random_index(2, 3, 300, 700, density=0.5, device="cuda")
    mask = index.to_dense(11)
    torch.cuda.set_sync_debug_mode("error")
    try:
        BlockIndex.from_dense(mask, 64, 64)
        index.canonicalize(11)
        index.to_dense(11)
        index.to_cudnn()
        index.density(300, 700, causal=True)
        index.to_flex(300, 700, causal=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("where", DEVICES)
def test_validate_on_large_index(where):
    index = random_index(1, 4, 6400, 6400, density=0.3, device=where)
    index.validate(100)
    last = int(index.counts[0, 3, 99]) - 1
    index.columns[0, 3, 99, last] = 100
    with pytest.raises(ValueError, match=rf"columns\[0, 3, 99, {last}\] = 100"):
        index.validate(100)
