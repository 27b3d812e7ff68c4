"""append_kv writes what its oracle writes, and nothing else."""

import math

import pytest
import torch

import attnsieve
from attnsieve import reference_decode
from cache_ops import CacheOps
from cases import BAD_IDS, DTYPES, pairwise, randn
from layouts import offsets, page_bounds
from numerics import assert_bitwise, assert_near_eager, rounding_noise

NAN, INF = math.nan, math.inf
E4M3 = torch.float8_e4m3fn
GUARD = 7.0  # what memory holds before; exact in every type


@pytest.fixture
def op(device):
    return CacheOps(device)


CASES = pairwise(
    dtype=DTYPES["cpu"],
    float8=(False, True),
    heads=(1, 2, 5),
    rows=(1, 3, 8, 70, 150),
    head_dim=(8, 64, 256),
    page_size=(None, 1, 16, 48),
    # The first sequence's length after the append; below 0 and beyond the cache too.
    length=("rows", "short", "middle", "beyond", -5, 2**31 - 1),
    bad_pages=(False, True),
    packed=(False, True),
    bounds=(None, "own", "float32"),
    proxy=(None, *DTYPES["cpu"]),
    proxy_dim=(8, 32),
    group=(1, 3),
)


def build(pick, seed=0):
    """Tensors and options of a call; caches and what is beside them are full of GUARD."""
    heads, rows, dim, page = pick["heads"], pick["rows"], pick["head_dim"], pick["page_size"]
    capacity = 160 if page is None else -(-160 // page) * page
    k, v = (3 * randn((2, heads, rows, dim), pick["dtype"], seed=seed + s) for s in (1, 2))
    named = dict(rows=rows, short=rows - 2, middle=rows + 5, beyond=capacity + 2)
    lens = torch.tensor([named.get(pick["length"], pick["length"]), 155], dtype=torch.int32)
    options = dict(seq_lens=lens)
    max_pages = None if page is None else capacity // page
    if page is not None:
        order = torch.randperm(2 * max_pages, generator=torch.Generator().manual_seed(seed))
        table = order.int().view(2, max_pages)
        if pick["bad_pages"]:
            table[1, -3:] = torch.tensor([*BAD_IDS, 2 * max_pages]).int()[seed % 4 :][:3]
        options["block_table"] = table
    cache_dtype = E4M3 if pick["float8"] else pick["dtype"]

    def cache(num_heads, width, dtype):
        shape = (2, num_heads, capacity, width)
        shape = shape if page is None else (2 * max_pages + 1, page, num_heads, width)
        return torch.full(shape, GUARD).to(dtype)

    caches = [cache(heads, dim, cache_dtype) for _ in range(2)]
    if pick["float8"]:
        options |= {f"{x}_scale": randn((heads,), seed=seed + 3).abs() / 9 for x in "kv"}
    if pick["bounds"] is not None:
        unit = page or 20
        pages = (2, -(-capacity // unit)) if page is None else (2 * max_pages + 1,)
        dtype = torch.float32 if pick["bounds"] == "float32" else pick["dtype"]
        options["bounds"] = torch.full((*pages, heads, 2, dim), GUARD, dtype=dtype)
        if page is None:
            options["page_size"] = unit
    if pick["proxy"] is not None:
        num_proxies = heads * pick["group"]
        shape = (num_proxies, dim, pick["proxy_dim"])
        options["projection"] = randn(shape, pick["dtype"], seed=seed + 4)
        options["proxy"] = cache(num_proxies, pick["proxy_dim"], pick["proxy"])
    if pick["packed"]:
        counts = [rows, rows // 2]
        k, v = (
            torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(counts)]) for x in (k, v)
        )
        options["cu_seqlens"] = offsets(counts, "cpu")
    return [k, v, *caches], options


def copy_of(tensors, options):
    written = ("bounds", "proxy")
    own = {name: x.clone() if name in written else x for name, x in options.items()}
    return [x.clone() for x in tensors], own


def eager_proxy(tensors, options):
    """The projected rows as PyTorch computes them in the proxy's dtype, where the oracle wrote."""
    (k, v, *caches), own = copy_of(tensors, options)
    heads = own["projection"].shape[0] // k.shape[1]
    if k.dim() == 3:
        rows = k.transpose(0, 1).repeat_interleave(heads, 0) @ own["projection"]
        rows = rows.transpose(0, 1)
    else:
        rows = k.repeat_interleave(heads, 1) @ own["projection"]
    rows = rows.to(own["proxy"].dtype)
    own = {n: x for n, x in own.items() if n in ("seq_lens", "block_table", "cu_seqlens")}
    out = options["proxy"].clone()
    reference_decode.append_kv(rows, rows, out, torch.zeros_like(out), **own)
    return out


@pytest.mark.parametrize("pick", CASES, ids=[str(i) for i in range(len(CASES))])
def test_append_equals_the_oracle(op, pick):
    tensors, options = build(pick)
    (got, own), (want, theirs) = (copy_of(tensors, options) for _ in range(2))
    assert op.append_kv(*got, **own) is None
    reference_decode.append_kv(*want, **theirs)
    for name, x, y in zip(("k", "v", "k_cache", "v_cache"), got, want, strict=True):
        assert_bitwise(x.float(), y.float(), f"{name} of {pick}")
    if pick["bounds"] is not None:
        assert_bitwise(own["bounds"], theirs["bounds"], f"bounds of {pick}")
    if pick["proxy"] is not None:
        exact = {n: x for n, x in theirs.items() if n != "proxy"} | {
            "proxy": options["proxy"].double()
        }
        reference_decode.append_kv(*copy_of(tensors, {})[0], **exact)
        ref = exact["proxy"]
        kept = [(x == GUARD).all(-1) for x in (own["proxy"], ref)]
        assert torch.equal(*kept), f"rows of proxy that are not new: {pick}"
        floor = 2 * rounding_noise(ref, pick["proxy"])
        assert_near_eager(
            "proxy", own["proxy"], ref, eager_proxy(tensors, options), floor, str(pick)
        )


def test_float8_codes_are_torchs(op):
    """Every bfloat16 number, and every float32 half way between two codes."""
    every = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16).float()
    codes = torch.arange(256).to(torch.uint8).view(E4M3).float()
    numbers = codes[codes.isfinite()].sort().values
    middle = (numbers[1:] + numbers[:-1]) / 2
    near = [middle, middle.nextafter(middle + 1), middle.nextafter(middle - 1)]
    x = torch.cat([every, *near])
    x = torch.cat([x, x.new_zeros(-len(x) % 64)]).view(1, 1, -1, 64)
    caches = [torch.zeros_like(x).to(E4M3) for _ in range(2)]
    scale = torch.ones(1)
    lens = torch.tensor([x.shape[2]], dtype=torch.int32)
    op.append_kv(x, x, *caches, seq_lens=lens, k_scale=scale, v_scale=4 * scale)
    for cache, divisor in zip(caches, (1, 4), strict=True):
        want = (x / divisor).clamp(-448, 448).to(E4M3)
        assert_bitwise(cache.float(), want.float())
        assert torch.equal(cache.float().signbit() | x.isnan(), x.signbit() | x.isnan())
    # The codes come back as numbers: the product with a unit vector reads one element of each key.
    ones = torch.ones(caches[0].shape[:-1])
    for d in (0, 37):
        unit = torch.nn.functional.one_hot(torch.tensor(d), 64).view(1, 1, 1, 64).float()
        keys = caches[0].float().nan_to_num(0).to(E4M3)
        scores = op.proxy_scores(unit, keys, key_scale=ones, score_scale=1.0)
        assert_bitwise(scores.flatten(), keys[0, 0, :, d].float())


@pytest.mark.parametrize("page_size", [1, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_appended_steps_equal_the_whole_cache(op, page_size, dtype):
    """Uneven steps, with a draft taken back: the cache, bounds and proxy of one long append."""
    q = randn((2, 4, 1, 64), dtype)
    k, v = (randn((2, 2, 90, 64), dtype, seed=s) for s in (1, 2))
    max_pages = -(-90 // page_size)
    table = torch.randperm(2 * max_pages + 3, generator=torch.Generator().manual_seed(1)).int()
    table = table[: 2 * max_pages].view(2, max_pages)
    shape = (2 * max_pages + 3, page_size, 2)
    caches = [torch.full((*shape, 64), NAN, dtype=dtype) for _ in range(2)]
    bounds = torch.full((len(caches[0]), 2, 2, 64), NAN, dtype=dtype)
    proxy = torch.full((*shape, 16), NAN)
    projection = randn((2, 64, 16), seed=8)
    side = dict(block_table=table, bounds=bounds, projection=projection, proxy=proxy)

    def append(begin, end, k, v):
        lens = torch.tensor([end, end], dtype=torch.int32)
        new = (x[:, :, begin:end] for x in (k, v))
        op.append_kv(*new, *caches, seq_lens=lens, validate=True, **side)

    append(0, 57, k, v)
    append(57, 58, k, v)
    append(58, 61, torch.full_like(k, NAN), torch.full_like(v, INF))  # a draft, rejected
    append(58, 66, k, v)
    append(66, 90, k, v)
    where = dict(block_table=table, seq_lens=torch.tensor([90, 90], dtype=torch.int32))
    got = attnsieve.decode(q, *caches, **where, return_lse=True)
    assert_bitwise(got, attnsieve.decode(q, k, v, return_lse=True))
    options = dict(element="bounds", page_size=page_size)
    got = op.proxy_scores(q, bounds, **options, **where)
    assert_bitwise(got, op.proxy_scores(q, page_bounds(k, page_size), **options))
    exact = op.proxy_scores(q, k, page_reduce="max", page_size=page_size)
    assert (got >= exact - 1e-4).all()
    rows = torch.einsum("bhjd,hdr->bhjr", k.double(), projection.double()).float()
    short = randn((2, 4, 1, 16), seed=3)
    got = op.proxy_scores(short, proxy, **where)[..., :90]
    torch.testing.assert_close(got, op.proxy_scores(short, rows), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("where", [0, 3, 7])
def test_nan_keys_are_nan_bounds_of_their_page_and_element(op, where):
    k, caches = randn((1, 2, 24, 64)), [torch.zeros(1, 2, 24, 64) for _ in range(2)]
    k[0, 1, 8 + where, 5] = NAN
    bounds, lens = torch.zeros(1, 3, 2, 2, 64), torch.tensor([24], dtype=torch.int32)
    op.append_kv(k, k, *caches, seq_lens=lens, bounds=bounds, page_size=8)
    assert torch.nonzero(bounds.isnan()).tolist() == [[0, 1, 1, 0, 5], [0, 1, 1, 1, 5]]
    assert_bitwise(bounds, page_bounds(k, 8))


def test_a_proxy_score_is_a_product_of_projected_vectors(op):
    """q . (k P) = (q P^T) . k: scoring projected keys is scoring keys by a projected query."""
    q, k = randn((2, 6, 1, 8)), randn((2, 3, 40, 64), seed=1)
    projection = randn((6, 64, 8), seed=2)
    proxy, caches = torch.zeros(2, 6, 40, 8), [torch.zeros(2, 3, 40, 64) for _ in range(2)]
    lens = torch.tensor([40, 40], dtype=torch.int32)
    op.append_kv(k, k, *caches, seq_lens=lens, projection=projection, proxy=proxy)
    got = op.proxy_scores(q, proxy, score_scale=1.0)
    lifted = torch.einsum("bhid,hDd->bhiD", q, projection)
    want = op.proxy_scores(lifted, k, score_scale=1.0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 3])
def test_results_depend_on_neither_neighbours_nor_threads(op, threads):
    pick = dict(CASES[0], dtype=torch.bfloat16, float8=False, heads=5, rows=70, head_dim=64)
    pick |= dict(page_size=16, length="middle", bad_pages=False, packed=False, group=3)
    pick |= dict(bounds="own", proxy=torch.float32, proxy_dim=32)
    tensors, options = build(pick)
    torch.set_num_threads(threads)
    got, own = copy_of(tensors, options)
    op.append_kv(*got, **own)
    alone, theirs = copy_of(tensors, options)
    for b in range(2):
        one = slice(b, b + 1)
        rows = {n: theirs[n][one] for n in ("seq_lens", "block_table")}
        op.append_kv(tensors[0][one], tensors[1][one], *alone[2:], **(theirs | rows))
    assert_bitwise(
        (*got[2:], own["bounds"], own["proxy"]), (*alone[2:], theirs["bounds"], theirs["proxy"])
    )


def test_strides(op):
    """Caches kept as [B, S, H, D], or K and V side by side; new rows cut out of a wider tensor."""
    k, v = (randn((2, 3, 2, 128), seed=s)[..., :64].transpose(1, 2) for s in (1, 2))
    lens = torch.tensor([3, 9], dtype=torch.int32)
    both = torch.zeros(2, 10, 2, 2, 64)
    op.append_kv(k, v, *both.permute(2, 0, 3, 1, 4), seq_lens=lens)
    tight = [torch.zeros(2, 2, 10, 64) for _ in range(2)]
    op.append_kv(k.contiguous(), v.contiguous(), *tight, seq_lens=lens)
    assert_bitwise(tuple(both.permute(2, 0, 3, 1, 4)), tuple(tight))
    assert_bitwise(tight[0][0, :, :3], k[0])


def test_validate_names_the_first_bad_place():
    k = torch.zeros(2, 2, 3, 64)
    caches = [torch.zeros(4, 8, 2, 64) for _ in range(2)]
    table = torch.tensor([[0, 1], [9, 3]], dtype=torch.int32)

    def append(*lens, table=table, rows=k, **options):
        seq_lens = torch.tensor(lens, dtype=torch.int32)
        where = dict(block_table=table, seq_lens=seq_lens, validate=True)
        attnsieve.append_kv(rows, rows, *caches, **where, **options)

    with pytest.raises(ValueError, match=r"seq_lens\[0\] = 2 is outside \[3, 16\]"):
        append(2, 12)
    with pytest.raises(ValueError, match=r"seq_lens\[1\] = 17 is outside"):
        append(3, 17)
    with pytest.raises(ValueError, match=r"block_table\[1, 0\] = 9 is outside \[0, 4\)"):
        append(3, 8)
    append(3, 11)  # the bad page holds none of the new rows
    packed = torch.zeros(4, 2, 64)
    with pytest.raises(ValueError, match="cu_seqlens: expected ascending offsets from 0 to 4"):
        append(3, 11, rows=packed, cu_seqlens=torch.tensor([0, 5, 4], dtype=torch.int32))
    bad = torch.tensor([0, 5, 4], dtype=torch.int32)
    lens = torch.tensor([3, 11], dtype=torch.int32)
    before = [x.fill_(GUARD).clone() for x in caches]
    with pytest.raises(ValueError, match="cu_seqlens"):
        attnsieve.append_kv(
            packed, packed, *caches, block_table=table, seq_lens=lens, cu_seqlens=bad
        )
    assert_bitwise(tuple(caches), tuple(before))


E4M3_CACHES = {name: torch.zeros(2, 2, 50, 64).to(E4M3) for name in ("k_cache", "v_cache")}
SCALES = dict(k_scale=torch.ones(2), v_scale=torch.ones(2))
BAD_CALLS = (
    ("k", dict(k=torch.zeros(2, 2, 64))),
    ("v", dict(v=torch.zeros(2, 2, 2, 64))),
    ("v", dict(v=torch.zeros(2, 2, 1, 64).half())),
    ("k_cache", dict(k_cache=torch.zeros(2, 3, 50, 64))),
    ("k_cache", dict(k_cache=torch.zeros(2, 2, 50, 32))),
    ("k_cache", dict(k_cache=torch.zeros(2, 2, 50, 64).half())),
    ("k_cache", dict(k_cache=torch.zeros(1, 2, 50, 64).expand(2, 2, 50, 64))),
    ("v_cache", dict(v_cache=torch.zeros(2, 2, 51, 64))),
    ("v_cache", dict(k_cache=E4M3_CACHES["k_cache"])),
    ("k_scale", E4M3_CACHES),
    ("v_scale", dict(E4M3_CACHES, k_scale=torch.ones(2))),
    ("v_scale", dict(E4M3_CACHES, k_scale=torch.ones(2), v_scale=torch.ones(3))),
    ("k_scale", SCALES),
    ("seq_lens", dict(seq_lens=torch.zeros(2).long())),
    ("seq_lens", dict(seq_lens=torch.zeros(3).int())),
    (
        "cu_seqlens",
        dict(cu_seqlens=torch.zeros(2).int(), k=torch.zeros(1, 2, 64))
        | dict(v=torch.zeros(1, 2, 64)),
    ),
    ("bounds", dict(bounds=torch.zeros(2, 3, 2, 2, 64), page_size=16)),
    ("bounds", dict(bounds=torch.zeros(2, 4, 2, 2, 64).half(), page_size=16)),
    ("page_size", dict(bounds=torch.zeros(2, 4, 2, 2, 64))),
    ("page_size", dict(page_size=16)),
    ("projection", dict(proxy=torch.zeros(2, 2, 50, 8))),
    ("proxy", dict(projection=torch.zeros(2, 64, 8))),
    ("projection", dict(projection=torch.zeros(3, 64, 8), proxy=torch.zeros(2, 3, 50, 8))),
    ("proxy", dict(projection=torch.zeros(2, 64, 8), proxy=torch.zeros(2, 2, 50, 16))),
)


@pytest.mark.parametrize("name, change", BAD_CALLS)
def test_bad_calls_name_the_argument(name, change):
    arguments = dict(
        k=torch.zeros(2, 2, 1, 64),
        v=torch.zeros(2, 2, 1, 64),
        k_cache=torch.zeros(2, 2, 50, 64),
        v_cache=torch.zeros(2, 2, 50, 64),
        seq_lens=torch.tensor([1, 1], dtype=torch.int32),
    )
    with pytest.raises(ValueError, match=rf"^{name}|bounds_{name}"):
        attnsieve.append_kv(**(arguments | change))


def test_refusals_name_what_is_missing():
    k, cache = torch.zeros(2, 2, 1, 64), torch.zeros(2, 2, 50, 64)
    lens = torch.tensor([1, 1], dtype=torch.int32)
    codes = cache.to(torch.int8)
    with pytest.raises(NotImplementedError, match="k_cache has dtype Char; supported.*Float8_e4m3"):
        attnsieve.append_kv(k, k, codes, codes, seq_lens=lens)
    with pytest.raises(NotImplementedError, match="head_dim 12.*multiple of 8"):
        short = [x[..., :12].contiguous() for x in (k, k, cache, cache)]
        attnsieve.append_kv(*short, seq_lens=lens)
    side = dict(projection=torch.zeros(2, 64, 12), proxy=torch.zeros(2, 2, 50, 12))
    with pytest.raises(NotImplementedError, match="head_dim 12.*multiple of 8"):
        attnsieve.append_kv(k, k, cache, cache.clone(), seq_lens=lens, **side)
    side = dict(projection=torch.zeros(2, 64, 8), proxy=torch.zeros(2, 2, 50, 8).to(E4M3))
    with pytest.raises(NotImplementedError, match="proxy has dtype"):
        attnsieve.append_kv(k, k, cache, cache.clone(), seq_lens=lens, **side)
    with pytest.raises(NotImplementedError, match="no backward"):
        attnsieve.append_kv(k.requires_grad_(), k, cache, cache.clone(), seq_lens=lens)


@pytest.mark.parametrize("shape", [(0, 2, 1, 64), (2, 2, 0, 64)])
def test_empty(op, shape):
    k, caches = torch.zeros(shape), [torch.full((shape[0], 2, 5, 64), GUARD) for _ in range(2)]
    bounds = torch.full((shape[0], 1, 2, 2, 64), GUARD)
    lens = torch.full((shape[0],), 3, dtype=torch.int32)
    op.append_kv(k, k, *caches, seq_lens=lens, bounds=bounds, page_size=5)
    assert all((x == GUARD).all() for x in (*caches, bounds))


@pytest.mark.parametrize("name", ["seq_lens", "block_table", "cu_seqlens"])
def test_validate_names_what_has_another_batch(name):
    k, pages = torch.zeros(2, 2, 1, 64), torch.zeros(4, 16, 2, 64)
    where = dict(seq_lens=torch.ones(2).int(), block_table=torch.zeros(2, 1).int())
    if name == "cu_seqlens":
        k, where["cu_seqlens"] = k[:, :, 0], torch.arange(4).int()
    else:
        where[name] = where[name][[0, 0, 0]]
    for validate in (False, True):
        with pytest.raises(ValueError, match=f"{name}: expected .*got"):
            attnsieve.append_kv(k, k, pages, pages.clone(), **where, validate=validate)
    if name != "cu_seqlens":
        with pytest.raises(ValueError, match="expected .*got"):
            attnsieve.decode(k, pages, pages, **where, validate=True)
