"""PagedKVCache holds what was appended, in whatever pages; a call that fails changes nothing.

The other side of every comparison is a plain list of rows per sequence.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnsieve
from attnsieve import PagedKVCache
from cases import capture, randn
from layouts import page_bounds
from numerics import assert_bitwise

TOLERANCE = dict(cpu=dict(rtol=1e-5, atol=1e-5), cuda=dict(rtol=2e-2, atol=2e-2))


def rows_of(cache, b, layer=0):
    """Keys and values of a sequence, collected page by page."""
    table, length = cache.block_table[b].tolist(), cache.lengths[b]
    pages = [table[j // cache.page_size] for j in range(length)]
    at = [(p, j % cache.page_size) for j, p in enumerate(pages)]
    return [torch.stack([x[layer][i] for i in at]) if at else None for x in (cache.k, cache.v)]


class Model:
    """The same cache as lists of rows [Hkv, D]; draws what is appended."""

    def __init__(self, batch, heads=2, dim=16):
        self.rows, self.shape, self.drawn = [[] for _ in range(batch)], (heads, dim), 0

    def draw(self, counts, factor=1.0):
        new = []
        for b, n in enumerate(counts):
            self.drawn += 1
            new.append(factor * randn((n, *self.shape), seed=self.drawn))
            self.rows[b] += list(new[-1])
        return new

    def assert_held_by(self, cache, layer=0):
        assert cache.lengths == cache.seq_lens.tolist() == [len(r) for r in self.rows]
        for b, rows in enumerate(self.rows):
            k, v = rows_of(cache, b, layer)
            if rows:
                assert torch.equal(k.cpu(), torch.stack(rows))
                assert torch.equal(v.cpu(), -torch.stack(rows))
        used = [p for row in cache.block_table.tolist() for p in row if p >= 0]
        assert len(set(used)) == len(used) == cache.k.shape[1] - cache.num_free_pages
        if cache.bounds is not None:
            for b, rows in enumerate(self.rows):
                for slot in range(0, len(rows), cache.page_size):
                    page = int(cache.block_table[b, slot // cache.page_size])
                    keys = torch.stack(rows[slot : slot + cache.page_size])
                    low, high = cache.bounds[layer, page].cpu().unbind(1)
                    assert (low <= keys.amin(0)).all() and (high >= keys.amax(0)).all()


STEPS = st.one_of(
    st.tuples(st.just("extend"), st.integers(0, 20)),
    st.tuples(st.just("extend"), st.lists(st.integers(0, 20), min_size=3, max_size=3)),
    st.tuples(st.just("trim"), st.integers(0, 9)),
    st.tuples(st.just("trim"), st.lists(st.integers(0, 9), min_size=3, max_size=3)),
    st.tuples(st.just("free"), st.integers(0, 2)),
    st.tuples(st.just("reserve"), st.integers(0, 30)),
)


@given(steps=st.lists(STEPS, max_size=12), page_size=st.sampled_from([1, 5, 16]))
def test_any_history_of_calls(steps, page_size):
    options = dict(batch=3, page_size=page_size, dtype=torch.float32, bounds=True)
    cache = PagedKVCache(120 // page_size, 2, 16, max_length=90, **options)
    model = Model(3)
    for name, amount in steps:
        counts = [amount] * 3 if isinstance(amount, int) else amount
        before = cache.lengths, cache.num_free_pages, cache.block_table.clone()
        try:
            if name == "free":
                cache.free(amount)
                model.rows[amount] = []
            else:
                getattr(cache, name)(amount)
        except (RuntimeError, ValueError) as error:
            longer = [len(r) + n for r, n in zip(model.rows, counts, strict=True)]
            held = (cache.block_table >= 0).sum(1).tolist()
            needed = [max(-(-n // page_size) - h, 0) for n, h in zip(longer, held, strict=True)]
            if name == "trim":
                assert any(2 * len(r) < n for r, n in zip(model.rows, longer, strict=True))
            elif isinstance(error, ValueError):
                assert max(longer) > 90
            else:
                assert "out of pages" in str(error) and sum(needed) > cache.num_free_pages
            assert (cache.lengths, cache.num_free_pages) == before[:2]
            assert torch.equal(cache.block_table, before[2])
            continue
        if name == "extend":
            new = model.draw(counts)
            packed = torch.cat(new)
            if isinstance(amount, int):
                packed = torch.stack(new).transpose(1, 2)
            cache.write(packed, -packed)
        elif name == "trim":
            model.rows = [r[: len(r) - n] for r, n in zip(model.rows, counts, strict=True)]
        model.assert_held_by(cache)


def test_device_holds_what_was_appended(device):
    cache = PagedKVCache(
        16, 2, 64, batch=2, page_size=16, dtype=torch.bfloat16, device=device, bounds=True
    )
    k, v = (randn((2, 2, 40, 64), torch.bfloat16, device, seed) for seed in (0, 1))
    for rows in (slice(0, 37), slice(37, 38), slice(38, 40)):
        cache.append(k[:, :, rows], v[:, :, rows])
    for b in range(2):
        for held, x in zip(rows_of(cache, b), (k, v), strict=True):
            assert torch.equal(held.transpose(0, 1), x[b])
        for slot, page in enumerate(cache.block_table[b, :3].tolist()):
            keys = k[b, :, 16 * slot : 16 * slot + 16]
            assert torch.equal(cache.bounds[0, page], torch.stack([keys.amin(1), keys.amax(1)], 1))


@pytest.mark.parametrize("score", ["quest", "exact"])
def test_attention_over_pages_equals_a_contiguous_cache(device, score):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q = randn((2, 8, 1, 64), dtype, device)
    k, v = (randn((2, 2, 200, 64), dtype, device, seed) for seed in (1, 2))
    cache = PagedKVCache(40, 2, 64, batch=2, dtype=dtype, device=device, bounds=True)
    cache.append(k[:, :, :150], v[:, :, :150])
    cache.append(k[:, :, 150:], v[:, :, 150:])
    options = dict(k=64, score=score, page_size=16, return_index=True)
    quest = score == "quest"
    bounds = page_bounds(k, 16) if quest else None
    out, index = attnsieve.topk_attention(q, k, v, bounds=bounds, **options)
    bounds = cache.bounds[0] if quest else None
    options |= dict(bounds=bounds, **cache.where)
    got, own = attnsieve.topk_attention(q, cache.k[0], cache.v[0], **options)
    assert torch.equal(own.indices, index.indices)
    torch.testing.assert_close(got, out, **TOLERANCE[device])


def test_layers_share_lengths_and_pages():
    cache = PagedKVCache(8, 2, 16, batch=2, num_layers=3, dtype=torch.float32, page_size=4)
    models = [Model(2) for _ in range(3)]
    for n in (5, 1, 1):
        cache.extend(n)
        for layer, model in enumerate(models):
            new = torch.stack(model.draw([n, n], factor=layer + 1)).transpose(1, 2)
            cache.write(new, -new, layer)
    for layer, model in enumerate(models):
        model.assert_held_by(cache, layer)
    layer = cache.layer(1)
    assert layer.k_cache.data_ptr() == cache.k[1].data_ptr() and layer.num_kv_heads == 2
    assert layer.lengths(2) is cache.seq_lens
    with pytest.raises(ValueError, match="3 layers"):
        cache.append(new, new)


def test_reserved_rows_change_no_table_and_no_memory():
    cache = PagedKVCache(8, 2, 16, batch=2, dtype=torch.float32)
    cache.reserve(50)
    table, addresses = cache.block_table.clone(), [x.data_ptr() for x in cache.where.values()]
    for _ in range(50):
        x = torch.zeros(2, 2, 1, 16)
        cache.append(x, x)
    assert torch.equal(cache.block_table, table) and cache.num_free_pages == 0
    assert [x.data_ptr() for x in cache.where.values()] == addresses


def test_a_rejected_draft_leaves_no_trace_in_bounds():
    cache = PagedKVCache(4, 1, 16, page_size=8, dtype=torch.float32, bounds=True)
    keys = randn((1, 1, 12, 16))
    cache.append(keys[:, :, :9], keys[:, :, :9])
    huge = torch.full((1, 1, 3, 16), 1e6)
    cache.append(huge, huge)
    cache.trim(3)
    cache.append(keys[:, :, 9:], keys[:, :, 9:])
    own = keys[0, 0, 8:12]
    page = int(cache.block_table[0, 1])
    assert torch.equal(cache.bounds[0, page, 0], torch.stack([own.amin(0), own.amax(0)]))


def test_projected_keys_are_kept_beside():
    projection = randn((1, 2, 16, 8), seed=5)
    cache = PagedKVCache(4, 2, 16, page_size=8, dtype=torch.float32, projection=projection)
    k = randn((1, 2, 20, 16))
    cache.append(k, k)
    held = torch.cat([cache.proxy[0, p] for p in cache.block_table[0].tolist() if p >= 0])[:20]
    torch.testing.assert_close(held.transpose(0, 1), k[0] @ projection[0])


def test_errors_name_what_is_wrong():
    cache = PagedKVCache(4, 2, 16, batch=2, dtype=torch.float32, max_length=40)
    x = torch.zeros(2, 2, 1, 16)
    with pytest.raises(ValueError, match="sequence 0 would have 41 tokens, max_length is 40"):
        cache.extend(41)
    with pytest.raises(RuntimeError, match="out of pages: 6 needed, 4 of 4 free"):
        cache.extend(40)
    for rows in (-1, [1], [1, -2], [1, 2, 3]):
        with pytest.raises(ValueError, match="rows: expected a number"):
            cache.extend(rows)
    cache.extend(2)
    with pytest.raises(ValueError, match=r"k: expected \[batch, Hkv, 2, D\].*\[2, 2, 1, 16\]"):
        cache.write(x, x)
    cache.extend([0, 1])
    with pytest.raises(ValueError, match=r"k: expected \[1, Hkv, D\]"):
        cache.write(x, x)
    with pytest.raises(ValueError, match="k: expected"):
        cache.append(x[0], x[0])
    with pytest.raises(ValueError, match="sequence 0 has 2 tokens, cannot trim 3"):
        cache.trim(3)
    with pytest.raises(IndexError):
        cache.free(2)
    with pytest.raises(ValueError, match="batch"):
        PagedKVCache(4, 2, 16, batch=0)


def test_a_step_in_a_cuda_graph(cuda_backend):
    """Captured once, replayed at other lengths with other contents; nothing synchronises."""
    dtype = torch.bfloat16
    cache = PagedKVCache(40, 2, 64, batch=2, dtype=dtype, device="cuda", bounds=True)
    prompt = randn((2, 2, 100, 64), dtype, "cuda", 1)
    cache.append(prompt, prompt)
    cache.reserve(60)
    shapes = ((2, 8, 1, 64), (2, 2, 1, 64), (2, 2, 1, 64))
    q, k, v = (randn(shape, dtype, "cuda", 2) for shape in shapes)

    def step():
        cache.write(k, v)
        bounds = cache.bounds[0]
        return attnsieve.topk_attention(
            q, cache.k[0], cache.v[0], k=64, bounds=bounds, **cache.where
        )

    cache.extend(1)
    graph, out = capture(step)
    for n in (1, 7, 20):
        news = [randn(shape, dtype, "cuda", 10 * n + i) for i, shape in enumerate(shapes)]
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(n):
                cache.extend(1)
                for x, new in zip((q, k, v), news, strict=True):
                    x.copy_(new)
                graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        assert_bitwise(out, step())  # the same rows once more, to the same places
