"""A whole decode step on a paged cache: append, score, select, attend; eager and as a graph."""

import dataclasses

import pytest
import torch

import attnsieve
from attnsieve import reference_decode
from cases import capture, randn
from layouts import deal_pages, fill_pages
from numerics import assert_bitwise

PAGE, WIDTH, HEADS, KV_HEADS, DIM = 16, 40, 8, 2, 64
CAPACITY = PAGE * WIDTH


@dataclasses.dataclass
class Step:
    """A cache whose newest row is not written yet, and that row."""

    q: torch.Tensor
    new_k: torch.Tensor
    new_v: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bounds: torch.Tensor
    table: torch.Tensor
    lens: torch.Tensor

    def tensors(self):
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


def step_of(lengths, seed, device):
    """Pages that no sequence owns hold NaN, in K, V and bounds."""
    dtype = torch.bfloat16
    batch = len(lengths)
    q = randn((batch, HEADS, 1, DIM), dtype, device, seed)
    new = [randn((batch, KV_HEADS, 1, DIM), dtype, device, seed + s) for s in (1, 2)]
    old = [randn((batch, KV_HEADS, CAPACITY, DIM), dtype, device, seed + s) for s in (3, 4)]
    table = deal_pages(lengths, WIDTH, PAGE, seed)
    written = [max(n - 1, 0) for n in lengths]
    pages = [fill_pages(x, written, table, PAGE) for x in old]
    bounds = torch.full((len(pages[0]), KV_HEADS, 2, DIM), torch.nan, dtype=dtype, device=device)
    for b, length in enumerate(written):
        for slot in range(-(-length // PAGE)):
            page = int(table[b, slot])
            keys = pages[0][page, : min(PAGE, length - slot * PAGE)]
            bounds[page, :, 0], bounds[page, :, 1] = keys.amin(0), keys.amax(0)
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Step(q, *new, *pages, bounds, table.to(device), lens)


def run(step, module=attnsieve):
    """Quest with 8 pages of 16 per KV head."""
    where = dict(block_table=step.table, seq_lens=step.lens)
    module.append_kv(
        step.new_k, step.new_v, step.k, step.v, bounds=step.bounds, page_size=PAGE, **where
    )
    scores = module.proxy_scores(
        step.q,
        step.bounds,
        element="bounds",
        page_size=PAGE,
        head_reduce="max",
        num_out_heads=KV_HEADS,
        **where,
    )
    index = module.select_topk(scores.float(), 8, seq_lens=step.lens, page_size=PAGE, recent=1)
    out, lse = module.decode(step.q, step.k, step.v, index, return_lse=True, **where)
    return index.indices, index.counts, out, lse


LENGTHS = ((300, 1, 640), (17, 33, 250), (639, 128, 0))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_step_equals_the_oracles(device, lengths):
    step = step_of(lengths, 1, device)
    twin = dataclasses.replace(step, **{n: getattr(step, n).clone() for n in ("k", "v", "bounds")})
    got = run(step)
    for name in ("k", "v", "bounds"):  # what was written, and nothing else
        before = getattr(twin, name).clone()
        own = step.lens > 0
        rows = (step.lens - 1).clamp(min=0).long()
        pages = step.table.long().gather(1, (rows // PAGE)[:, None])[:, 0]
        for b in torch.nonzero(own)[:, 0].tolist():
            page, row = int(pages[b]), int(rows[b]) % PAGE
            if name == "bounds":
                keys = step.k[page, : row + 1]
                before[page, :, 0], before[page, :, 1] = keys.amin(0), keys.amax(0)
            else:
                before[page, row] = getattr(step, f"new_{name}")[b, :, 0]
        assert_bitwise(getattr(step, name), before, name)
    on_cpu = Step(*(x.cpu() for x in twin.tensors()))
    indices, counts, out, lse = run(on_cpu, reference_decode)
    assert_bitwise(got[1].cpu(), counts)
    # Page scores may round differently; a page that differs must have tied to within that.
    assert (got[0].cpu() != indices).float().mean() < 0.02
    if torch.equal(got[0].cpu(), indices):
        torch.testing.assert_close(got[2].cpu().double(), out, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(got[3].cpu().double(), lse, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("cuda_backend")
def test_graph_replay_with_new_lengths_tables_and_contents():
    static = step_of(LENGTHS[0], 1, "cuda")
    graph, result = capture(run, static)
    for seed, lengths in enumerate(LENGTHS, 5):
        fresh = step_of(lengths, seed, "cuda")
        for to, x in zip(static.tensors(), fresh.tensors(), strict=True):
            to.copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        assert_bitwise(result, run(fresh), f"replay with {lengths}")
