"""Selected tokens and pages are exactly what the rule says: multisets, ties, NaN, forced sets."""

import pytest
import torch

import attnsieve
from attnsieve import reference_decode
from cases import BAD_IDS, EDGE, pairwise
from numerics import assert_bitwise
from token_lists import INF, NAN, OnDevice, by_stable_sort, lists_of, scores_of


@pytest.fixture
def op(device):
    return OnDevice(attnsieve, device)


@pytest.fixture(params=["oracle", "op"])
def select(request, device):
    """The functions under test: both modules are held to the same statements."""
    return OnDevice(reference_decode if request.param == "oracle" else attnsieve, device)


@pytest.mark.parametrize("k", [1, 2, 64, 255, 300])
@pytest.mark.parametrize("kind", range(6))
def test_topk_is_a_stable_sort(select, kind, k):
    scores = scores_of(kind)
    index = select.select_topk(scores, k)
    assert_bitwise(index.indices, by_stable_sort(scores, k))
    assert (index.counts == k).all()
    index.validate(300)


@pytest.mark.parametrize("kind", [0, 1, 2, 4])
def test_score_multisets_equal_torch_topk(select, kind):
    scores = scores_of(kind)
    index = select.select_topk(scores, 77)
    kept = scores.gather(-1, index.indices.long()).sort(-1, descending=True).values
    assert_bitwise(kept, scores.topk(77, -1).values)


@pytest.mark.parametrize("kind", [0, 3, 4, 5])
def test_fewer_candidates_than_k(select, kind):
    lens = torch.tensor([0, 40], dtype=torch.int32)
    index = select.select_topk(scores_of(kind), 64, seq_lens=lens)
    assert lists_of(index) == [[]] * 3 + [list(range(40))] * 3
    beyond = torch.tensor([-5, 2**31 - 1], dtype=torch.int32)
    index = select.select_topk(scores_of(kind), 500, seq_lens=beyond)
    assert lists_of(index) == [[]] * 3 + [list(range(300))] * 3
    assert index.indices.shape == (2, 3, 500)


def test_scores_beyond_the_length_never_matter(select):
    scores = scores_of(1)
    lens = torch.tensor([0, 123], dtype=torch.int32)
    expected = select.select_topk(scores, 20, seq_lens=lens)
    for poison in (NAN, INF, -INF):
        scores[0], scores[1, :, 123:] = poison, poison
        assert_bitwise(select.select_topk(scores, 20, seq_lens=lens).indices, expected.indices)


@pytest.mark.parametrize("sink, recent", [(1, 0), (0, 4), (3, 5), (4, 6)])
@pytest.mark.parametrize("kind", [0, 1, 3, 5])
def test_forced_ranges_are_inside_the_budget(select, kind, sink, recent):
    scores = scores_of(kind)
    lens = torch.tensor([7, 200], dtype=torch.int32)
    index = select.select_topk(scores, 10, seq_lens=lens, sink=sink, recent=recent)
    lists = lists_of(index)
    assert lists[:3] == [list(range(7))] * 3
    raised = scores[1, :, :200].clone()
    middle = by_stable_sort(raised[:, sink : 200 - recent], 10 - sink - recent) + sink
    ends = [*range(sink)], [*range(200 - recent, 200)]
    assert lists[3:] == [ends[0] + row.tolist() + ends[1] for row in middle]


def test_forced_beyond_the_budget_is_refused(select):
    for sink, recent in ((5, 6), (-1, 0), (0, -1), (11, 0)):
        with pytest.raises(ValueError, match="sink|recent"):
            select.select_topk(scores_of(0), 10, sink=sink, recent=recent)


@pytest.mark.parametrize("page_size", [1, 16])
def test_rows_see_their_own_prefix(select, page_size):
    scores = scores_of(0, (2, 4, 3, 20))
    lens = torch.tensor([3, 20 * page_size], dtype=torch.int32)
    options = dict(page_size=page_size, recent=1)
    index = select.select_topk(scores, 5, seq_lens=lens, causal=True, **options)
    for row in range(4):
        own = select.select_topk(scores[:, row], 5, seq_lens=lens - 3 + row, **options)
        assert_bitwise(index.indices[:, row], own.indices)
        assert_bitwise(index.counts[:, row], own.counts)
    whole = select.select_topk(scores, 5, seq_lens=lens, **options)
    assert_bitwise(whole.indices[:, 3], index.indices[:, 3])


def test_slots_come_from_the_page_table(select):
    scores = scores_of(0, (2, 3, 64))
    table = torch.randperm(16, generator=torch.Generator().manual_seed(2)).int().view(2, 8)
    table[0, 1:6] = torch.tensor(BAD_IDS)
    plain = select.select_topk(scores, 20, sink=2)
    where = dict(block_table=table, table_page_size=8, num_pages=16)
    slots = select.select_topk(scores, 20, sink=2, **where)
    assert slots.physical and torch.equal(slots.counts, plain.counts)
    for b in range(2):
        j = plain.indices[b].long()
        page = table[b].long()[j // 8]
        expected = torch.where((page >= 0) & (page < 16), page * 8 + j % 8, -1)
        assert_bitwise(slots.indices[b], expected.int())
    pages = select.select_topk(scores[..., :8], 8, page_size=8, **where)
    assert_bitwise(pages.indices[1], table[1].expand(3, 8))
    with pytest.raises(ValueError, match="page_size"):
        select.select_topk(scores, 20, page_size=4, **where)


@pytest.mark.parametrize("kind", range(6))
@pytest.mark.parametrize("threshold", [-INF, -0.5, 0.0, 0.5, INF, NAN])
def test_threshold_keeps_what_is_above(select, kind, threshold):
    scores = scores_of(kind)
    index, passed = select.select_threshold(scores, threshold, 300)
    expected = [torch.nonzero(row > threshold).flatten().tolist() for row in scores.flatten(0, 1)]
    assert lists_of(index) == expected
    assert_bitwise(passed, index.counts)


@pytest.mark.parametrize("kind", [0, 1, 3])
def test_threshold_overflow_keeps_the_best(select, kind):
    scores = scores_of(kind)
    index, passed = select.select_threshold(scores, -3.0, 50, sink=2, recent=3)
    assert_bitwise(index.indices, select.select_topk(scores, 50, sink=2, recent=3).indices)
    forced = torch.zeros(300, dtype=torch.bool)
    forced[:2], forced[-3:] = True, True
    assert_bitwise(passed, ((scores > -3.0) | forced).sum(-1).int())


def test_threshold_per_head(select):
    scores = scores_of(1)
    limits = torch.tensor([[0.0, 1.0, INF], [-1.0, NAN, 2.0]])
    index, _ = select.select_threshold(scores, limits, 300, recent=1)
    for b in range(2):
        for h in range(3):
            own, _ = select.select_threshold(
                scores[b : b + 1, h : h + 1], limits[b, h], 300, recent=1
            )
            assert_bitwise(index.indices[b, h], own.indices[0, 0])
    by_batch, _ = select.select_threshold(scores, limits[:, 0], 300)
    assert_bitwise(by_batch.indices[1], select.select_threshold(scores, -1.0, 300)[0].indices[1])


def test_a_started_page_is_a_candidate(select):
    lens = torch.tensor([33, 48, 49], dtype=torch.int32)
    index = select.select_topk(scores_of(0, (3, 1, 20)), 8, seq_lens=lens, page_size=16, recent=1)
    assert lists_of(index) == [[0, 1, 2], [0, 1, 2], [0, 1, 2, 3]]


@pytest.mark.parametrize("shape", [(0, 2, 8), (2, 0, 8), (2, 2, 0), (2, 0, 3, 8)])
def test_empty(select, shape):
    index = select.select_topk(torch.zeros(shape), 4)
    assert index.indices.shape == (*shape[:-1], 4)
    assert (index.indices == -1).all() or shape[-1] > 0
    none = select.select_topk(torch.zeros(2, 2, 8), 0)
    assert none.indices.shape == (2, 2, 0) and (none.counts == 0).all()


# ---- the op against the oracle

CASES = pairwise(
    columns=EDGE,
    k=(1, 2, 15, 64, 300),
    kind=range(6),
    forced=((0, 0), (1, 0), (0, 1)),
    page_size=(1, 16),
    rows=(None, 1, 3),
    lengths=range(3),
    table=(False, True),
)


@pytest.mark.parametrize("pick", CASES, ids=[str(i) for i in range(len(CASES))])
def test_op_equals_oracle(op, pick):
    columns, page_size = pick["columns"], pick["page_size"]
    shape = (2, 3, columns) if pick["rows"] is None else (2, pick["rows"], 3, columns)
    scores = scores_of(pick["kind"], shape)
    options = dict(page_size=page_size, recent=pick["forced"][1])
    options["sink"] = min(pick["forced"][0], pick["k"] - options["recent"])
    if pick["lengths"] > 0:
        longest = columns * page_size
        lens = ([longest, longest // 2], [-3, longest + 5])[pick["lengths"] - 1]
        options["seq_lens"] = torch.tensor(lens, dtype=torch.int32)
        options["causal"] = pick["rows"] is not None
    if pick["table"]:
        tokens, pages = (page_size, columns) if page_size > 1 else (8, -(-columns // 8))
        table = torch.arange(2 * pages, dtype=torch.int32).view(2, pages).flip(-1).contiguous()
        table[0, 0] = BAD_IDS[pick["kind"] % len(BAD_IDS)]
        options |= dict(block_table=table, table_page_size=tokens, num_pages=2 * pages - 1)
    actual = op.select_topk(scores, pick["k"], **options)
    expected = reference_decode.select_topk(scores, pick["k"], **options)
    assert_bitwise((actual.indices, actual.counts), (expected.indices, expected.counts), str(pick))
    for threshold in (0.1, torch.tensor([0.5, -0.5])):
        arguments = scores, threshold, pick["k"]
        actual, passed = op.select_threshold(*arguments, **options)
        expected, wanted = reference_decode.select_threshold(*arguments, **options)
        assert_bitwise((actual.indices, actual.counts), (expected.indices, expected.counts))
        assert_bitwise(passed, wanted)


@pytest.mark.parametrize("values", [1, 2, 33])
@pytest.mark.parametrize("k", [1, 2048, 4096])
def test_long_lists_of_ties(op, values, k):
    """Few values over 100,000 candidates: the bucket of the cut overflows any fixed buffer."""
    generator = torch.Generator().manual_seed(values)
    scores = torch.randint(0, values, (1, 2, 100_003), generator=generator).float() - values // 2
    index = op.select_topk(scores, k)
    assert_bitwise(index.indices, by_stable_sort(scores, k))


def test_scores_that_differ_in_one_bit(op):
    """Neighbouring floats, negative and denormal ones too: every digit of the key decides once."""
    bits = torch.randperm(1 << 12, generator=torch.Generator().manual_seed(0)).int()
    for base in (0, 0x3F800000, 0x7F000000):
        for sign in (1.0, -1.0):
            scores = (bits + base).view(torch.float32)[None, None] * sign
            index = op.select_topk(scores, 777)
            assert_bitwise(index.indices, by_stable_sort(scores, 777))


def test_strides_and_threads_do_not_matter(op):
    big = op.to_device(scores_of(3, (4, 6, 5, 311)))
    scores = big[1:3, ::2, :, :300].transpose(1, 2)
    assert not scores.is_contiguous()
    options = dict(seq_lens=torch.tensor([300, 299]).int(), causal=True, recent=1)
    expected = op.select_topk(scores.contiguous(), 50, **options)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert_bitwise(op.select_topk(scores, 50, **options).indices, expected.indices)


BAD_CALLS = (
    ("scores", dict(scores=torch.zeros(4))),
    ("scores", dict(scores=torch.zeros(2, 3, 8).double())),
    ("scores", dict(scores=torch.zeros(2, 8, 3).transpose(1, 2))),
    ("k", dict(k=-1)),
    ("k", dict(k=2**31)),
    ("page_size", dict(page_size=0)),
    ("sink", dict(sink=3, recent=2)),
    ("sink", dict(sink=-1)),
    ("recent", dict(recent=-1)),
    ("seq_lens", dict(seq_lens=torch.zeros(3).int())),
    ("seq_lens", dict(seq_lens=torch.zeros(2).long())),
    ("causal", dict(causal=True, seq_lens=torch.zeros(2).int())),
    ("causal", dict(causal=True, scores=torch.zeros(2, 1, 3, 8))),
    ("block_table", dict(block_table=torch.zeros(3, 1).int(), num_pages=1)),
    ("block_table", dict(block_table=torch.zeros(2, 1), num_pages=1)),
    ("table_page_size", dict(block_table=torch.zeros(2, 1).int(), table_page_size=0)),
    ("page_size", dict(block_table=torch.zeros(2, 1).int(), table_page_size=8, page_size=4)),
    ("num_pages", dict(block_table=torch.zeros(2, 1).int(), num_pages=-1)),
    ("num_pages", dict(block_table=torch.zeros(2, 1).int(), num_pages=2**30, table_page_size=8)),
)


@pytest.mark.parametrize("name, change", BAD_CALLS)
def test_bad_calls_name_the_argument(op, name, change):
    arguments = dict(scores=torch.zeros(2, 3, 8), k=4) | change
    with pytest.raises(ValueError, match=name):
        op.select_topk(**arguments)
    if name != "k":
        arguments["capacity"] = arguments.pop("k")
        with pytest.raises(ValueError, match=name):
            op.select_threshold(threshold=0.0, **arguments)


def test_bad_thresholds(op):
    scores = torch.zeros(2, 3, 8)
    for threshold in (None, "0"):
        with pytest.raises(TypeError, match="threshold"):
            op.select_threshold(scores, threshold, 4)
    for shape, dtype in (((2, 3, 1), torch.float32), ((2, 3), torch.float64)):
        with pytest.raises(ValueError, match="threshold"):
            op.select_threshold(scores, torch.zeros(shape, dtype=dtype), 4)
    with pytest.raises(NotImplementedError, match="backward"):
        op.select_topk(scores.requires_grad_(), 4)
