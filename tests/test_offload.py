"""A working set holds what a step wants; attention over it has the bits of one over the cache."""

import pytest
import torch

import attnsieve
from attnsieve import TokenIndex, WorkingSet, host_cache
from cases import cuda_only, randn
from numerics import assert_bitwise

BATCH, HEADS, DIM = 2, 2, 64


def dtype_of(device):
    return torch.float32 if device == "cpu" else torch.bfloat16


def working_set(device, num_slots, dim=DIM):
    made = WorkingSet(BATCH, HEADS, num_slots, dim, dtype=dtype_of(device), device=device)
    for rows in (made.k, made.v):
        rows.fill_(torch.nan)  # what no token was put into is never read
    return made


def caches(device, length, dim=DIM, seed=0):
    """K and V in host memory."""
    made = []
    for i in range(2):
        cache = host_cache((BATCH, HEADS, length, dim), dtype=dtype_of(device), device=device)
        cache.copy_(randn((BATCH, HEADS, length, dim), torch.float32, seed=seed + i))
        made.append(cache)
    return made


def random_lists(length, capacity, generator):
    """Ascending tokens, counts of their own, padding that is not -1 everywhere."""
    indices = torch.full((BATCH, HEADS, capacity), -1, dtype=torch.int32)
    counts = torch.randint(0, min(capacity, length) + 1, (BATCH, HEADS), generator=generator)
    for line, count in zip(indices.view(-1, capacity), counts.flatten().tolist(), strict=True):
        line[:count] = torch.randperm(length, generator=generator)[:count].sort().values
        line[count:] = line[count - 1] if count % 2 else -1
    return indices, counts.int()


class Rule:
    """What the slots of one list hold: hits stay, misses take the free slots in order."""

    def __init__(self, num_slots):
        self.tokens = [-1] * num_slots

    def step(self, wanted, first_new):
        self.tokens = [-1 if t >= first_new else t for t in self.tokens]
        free = [i for i, t in enumerate(self.tokens) if t not in wanted]
        copied = 0
        for token in wanted:
            if token not in self.tokens:
                self.tokens[free[copied]] = token
                copied += 1
        return [self.tokens.index(t) for t in wanted], copied


@pytest.mark.parametrize("num_slots, capacity", [(40, 40), (64, 40), (1, 1), (700, 600)])
def test_slots_follow_the_rule(device, num_slots, capacity):
    length = 5 * capacity
    k, v = caches(device, length)
    held = working_set(device, num_slots)
    rules = [Rule(num_slots) for _ in range(BATCH * HEADS)]
    generator = torch.Generator().manual_seed(1)
    wanted = copied = 0
    last = random_lists(length, capacity, generator)
    for step in range(30):
        indices, counts = random_lists(length, capacity, generator)
        if step % 3 == 1:  # the last lists, but for the first token
            indices, counts = last[0].clone(), last[1]
            indices[..., 0] -= (indices[..., 0] > 0).int()
        last = indices, counts
        first_new = torch.tensor([length - 3 * step, length], dtype=torch.int32)
        index = TokenIndex(indices.to(device), counts.to(device))
        places = held.fetch(index, k, v, first_new=first_new.to(device))
        positions, slots = places.indices.cpu(), held.slots.cpu()
        for line, rule in enumerate(rules):
            b, h = divmod(line, HEADS)
            count = int(counts[b, h])
            want, missed = rule.step(indices[b, h, :count].tolist(), int(first_new[b]))
            assert positions[b, h, :count].tolist() == want, (step, b, h)
            assert (positions[b, h, count:] == -1).all()
            assert slots[b, h].tolist() == rule.tokens, (step, b, h)
            wanted, copied = wanted + count, copied + missed
            for rows, cache in ((held.k, k), (held.v, v)):
                expected = cache[b, h].cpu()[indices[b, h, :count].long()]
                assert_bitwise(rows[b, h].cpu()[want], expected)
    assert held.moved.tolist() == [wanted, copied]
    assert held.hit_rate == 1 - copied / wanted
    assert held.bytes_moved == 2 * copied * DIM * k.element_size()
    held.reset()
    assert held.hit_rate == 1.0 and (held.slots == -1).all()


def proxies(k, rank=16):
    return k[..., :rank].contiguous().to(k.device)


def test_offloaded_equals_resident_over_many_steps(device):
    """1,000 steps of a growing cache with changing budgets; at times tokens are taken back."""
    room, generator = 1300, torch.Generator().manual_seed(2)
    k, v = caches(device, room)
    resident = [x.cpu().to(device) for x in (k, v)]
    projection = torch.eye(DIM, 16, device=device).expand(HEADS, -1, -1)
    held = working_set(device, 96)
    lengths = torch.tensor([130, 7])
    for step in range(1000):
        grown = torch.randint(-4, 2, (BATCH,), generator=generator) if step % 50 == 49 else 1
        lengths = (lengths + grown).clamp(1, room)
        lens = lengths.int().to(device)
        new = randn((2, BATCH, HEADS, 1, DIM), dtype_of(device), device, seed=step)
        for cache in ((k, v), tuple(resident)):
            attnsieve.append_kv(*new, *cache, seq_lens=lens)
        q = randn((BATCH, 2 * HEADS, 1, DIM), dtype_of(device), device, seed=step // 5)
        options = dict(projection=projection, seq_lens=lens, return_lse=True, recent_tokens=4)
        options |= dict(k=int(torch.randint(8, 97, (), generator=generator)))
        options |= dict(proxy=proxies(resident[0]), return_index=True)
        want = attnsieve.low_rank_attention(q, *resident, **options)
        got = attnsieve.low_rank_attention(q, k, v, working_set=held, **options)
        assert_bitwise(got[0], want[0], f"step {step}")
        assert_bitwise(got[2], want[2], f"step {step}")
        assert_bitwise(got[1].indices, want[1].indices)
    assert 0.3 < held.hit_rate < 1.0


@pytest.mark.parametrize("length", range(1, 40))
def test_no_token_is_lost(device, length):
    """With room for all, every length around the recent window attends to everything."""
    k, v = caches(device, 40)
    lens = torch.full((BATCH,), length, dtype=torch.int32, device=device)
    for cache in (k, v):
        cache[:, :, length:] = torch.nan
    q = randn((BATCH, 4, 1, DIM), dtype_of(device), device)
    out = attnsieve.low_rank_attention(
        q,
        k,
        v,
        projection=torch.eye(DIM, 16, device=device).expand(HEADS, -1, -1),
        proxy=proxies(k),
        k=40,
        recent_tokens=16,
        seq_lens=lens,
        working_set=working_set(device, 40),
    )
    dense = attnsieve.decode(q, k, v, seq_lens=lens)
    torch.testing.assert_close(out, dense, atol=1e-2 if device == "cuda" else 1e-5, rtol=1e-2)
    assert torch.isfinite(out).all()


def test_lists_that_are_not_canonical_are_memory_safe(device):
    """Tokens listed twice, descending or outside: what can be placed is, the rest is left out."""
    k, v = caches(device, 50)
    held = working_set(device, 6)
    guard = held.slots.clone()
    for wrong in ([3, 3, 3, 3, 3, 3], [9, 7, 5, 3, 2, 1], [-5, 2, 50, 99, 2**31 - 1, -1]):
        indices = torch.tensor(wrong, dtype=torch.int32, device=device).expand(BATCH, HEADS, 6)
        for count in (6, 99, -1):
            counts = torch.full((BATCH, HEADS), count, dtype=torch.int32, device=device)
            places = held.fetch(TokenIndex(indices.contiguous(), counts), k, v)
            assert ((places.indices >= -1) & (places.indices < 6)).all()
            assert ((held.slots >= -1) & (held.slots < 50)).all()
    assert held.slots.shape == guard.shape


def test_host_cache_is_memory_of_the_host(device):
    cache = host_cache((2, 3, 5, 8), dtype=torch.bfloat16, device=device)
    assert cache.device.type == device and cache.shape == (2, 3, 5, 8) and not cache.any()
    cache += 2
    assert (cache.cpu() == 2).all()
    assert host_cache((0, 3), dtype=torch.float32, device=device).shape == (0, 3)


@cuda_only
def test_host_cache_takes_no_device_memory():
    before = torch.cuda.memory_allocated()
    cache = host_cache((1 << 28,), dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_allocated() == before
    cache[-1] = 7
    assert int(cache[-1]) == 7


def test_a_failed_allocation_leaves_the_cache_usable(device, monkeypatch):
    k, v = caches(device, 30)
    held = working_set(device, 8)

    def fail(*args, **options):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            host_cache((10, 10), dtype=torch.float32, device=device)
    indices = torch.arange(8, dtype=torch.int32, device=device).expand(BATCH, HEADS, 8)
    places = held.fetch(TokenIndex(indices.contiguous()), k, v)
    assert_bitwise(held.k[:, :, :8], k[:, :, :8])
    assert places.indices[0, 0].tolist() == list(range(8))


@pytest.mark.parametrize("name", ["slots", "k", "head_dim", "v", "index"])
def test_bad_arguments_are_named(device, name):
    held = working_set(device, 8)
    capacity = 20 if name == "slots" else 8
    indices = torch.zeros(BATCH, HEADS, capacity, dtype=torch.int32, device=device)
    k, v = caches(device, 30, 32 if name == "head_dim" else DIM)
    if name == "k":
        k = k[:, :1]
    if name == "v":
        v = v[:, :, :20]
    index = TokenIndex(indices, page_size=2 if name == "index" else 1)
    with pytest.raises((ValueError, RuntimeError), match=name):
        held.fetch(index, k, v)


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(rows=2), "q"),
        (dict(num_lists=4), "num_lists"),
        (dict(block_table=torch.zeros(BATCH, 1, dtype=torch.int32)), "block_table"),
    ],
)
def test_what_a_working_set_does_not_serve_is_refused(device, change, name):
    k, v = caches(device, 30)
    options = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in change.items()}
    q = randn((BATCH, 4, options.pop("rows", 1), DIM), dtype_of(device), device)
    options["projection"] = torch.eye(DIM, 16, device=device).expand(HEADS, -1, -1)
    proxy = proxies(k)
    if "block_table" in options:
        k, v, proxy = (x.transpose(1, 2).contiguous() for x in (k, v, proxy))
    with pytest.raises(NotImplementedError, match=name):
        attnsieve.low_rank_attention(
            q, k, v, proxy=proxy, k=8, working_set=working_set(device, 8), **options
        )
