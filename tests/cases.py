"""The shape vocabulary of the suite and the problems built from it."""

from __future__ import annotations

import itertools
import os
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
import torch

import attnsieve
from attnsieve.index import BlockIndex

EDGE = (1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 257)
PAIRS = (  # (seqlen_q, seqlen_k) of FlashAttention-3's tests, and two transposed ones
    *((1, 1), (64, 128), (128, 192), (256, 256), (239, 1), (799, 3), (113, 203), (113, 128)),
    *((128, 217), (113, 211), (108, 256), (256, 512), (384, 256), (640, 128), (512, 256)),
    *((1, 239), (3, 799), (1024, 1024), (1023, 1024), (1024, 1023), (4096, 4096), (4224, 4224)),
)
GQA = ((1, 1), (8, 8), (8, 2), (6, 3), (16, 1))  # (num_heads, num_kv_heads)
BLOCKS = tuple(itertools.product((64, 128), (64, 16, 128, 32)))  # (block_q, block_k)
PAGE_SIZES = (16, 48, 64, 128, 256)
LAYOUTS = ("batched", "varlen", "paged", "paged_varlen")
DENSITIES = (0.0, "one", 0.05, 0.2, 0.7, 1.0)
BAD_IDS = (-(2**31), -123456, -1, 114514, 2**31 - 1)

CUDA_AVAILABLE = torch.cuda.is_available()
cuda_only = pytest.mark.skipif(not CUDA_AVAILABLE, reason="needs a CUDA GPU, none is visible")
DEVICES = ("cpu", pytest.param("cuda", marks=cuda_only))

# attend has one kernel family per backend; this variable makes the library take that one and no
# other. Cases and the `device` fixture force each family in turn.
FORCE_BACKEND = "ATTNSIEVE_BACKEND"
CUDA_BACKENDS = ("sm_80", "sm_90")
BACKENDS = ("cpu", *CUDA_BACKENDS)

# What each device and backend computes; anything else must be refused.
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16, torch.float16),
}


def _listed_head_dims(backend: str) -> tuple[int, ...]:
    """The head dims of the capability table's attend row; () where there is no such row."""
    try:
        rows = attnsieve.capabilities()
    except ImportError:  # no _C for this Python, as where only libattnsieve.so was copied
        return (64, 96, 128, 256) if backend == "sm_90" else (64, 128)
    for row in rows:
        if (row["op"], row["backend"]) == ("attend", backend):
            listed = re.search(r"head_dim in \{([0-9, ]+)\}", row["supported"])
            return tuple(int(d) for d in listed[1].split(",")) if listed else ()
    return ()


HEAD_DIMS = {
    "cpu": (8, 40, 64, 96, 128, 256),
    **{backend: _listed_head_dims(backend) for backend in CUDA_BACKENDS},
}


def backend_marks(backend: str | None) -> list:
    """Marks that skip what this machine or build cannot run on ``backend``, with the reason."""
    if backend == "cpu":
        return []
    if backend == "sm_90" and CUDA_AVAILABLE:
        capability = torch.cuda.get_device_capability()
        reason = f"sm_90 runs on compute capability 9.0, this GPU has {capability}"
        if capability != (9, 0):
            return [pytest.mark.skip(reason=reason)]
        if not HEAD_DIMS["sm_90"]:
            return [pytest.mark.skip(reason="the capability table has no sm_90 attend")]
    return [cuda_only]


def forced_backend() -> str | None:
    """The attend backend that the running test forces; None on the CPU."""
    return os.environ.get(FORCE_BACKEND) or None


def device_of(backend: str) -> str:
    return "cpu" if backend == "cpu" else "cuda"


def backend_id(backend: str) -> str:
    """Of a test on a backend: GPU runs choose theirs by the word cuda."""
    return "cpu" if backend == "cpu" else f"cuda-{backend}"


def head_dims(device: str) -> tuple[int, ...]:
    """Head dims of the device under the backend that is forced right now."""
    if device == "cpu":
        return HEAD_DIMS["cpu"]
    return HEAD_DIMS[os.environ.get(FORCE_BACKEND, "sm_80")]


def refuses_votes(head_dim: int, skip_block: int, run: Callable[[], object]) -> bool:
    """Whether the forced backend has no votes on tiles this wide; then ``run`` has to say so."""
    if forced_backend() != "sm_90" or head_dim <= 128 or skip_block == 64:
        return False
    with pytest.raises(NotImplementedError, match=f"skip_block {skip_block}.*head_dim {head_dim};"):
        run()
    return True


@dataclass(frozen=True)
class Case:
    """One attention problem.

    ``backend``: the kernel family that a test of this case is forced onto, None for the best.
    ``density`` None: no index. ``list_heads`` in {"q", "kv", "one"}. ``layout``: one of LAYOUTS; in
    all but "batched" every sequence has its own lengths, the first one the longest. Pages: see
    ``layouts.py``.
    """

    device: str
    seqlen_q: int
    seqlen_k: int
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    batch: int = 2
    causal: bool = False
    window: tuple[int, int] | None = None
    block: tuple[int, int] = (64, 64)
    density: float | str | None = None
    list_heads: str = "q"
    sink: bool = False
    layout: str = "batched"
    page_size: int = 64
    seed: int = 0
    backend: str | None = None

    def __str__(self) -> str:
        window = "" if self.window is None else f"-w{self.window[0]},{self.window[1]}"
        index = ""
        if self.density is not None:
            index = f"-b{self.block[0]}x{self.block[1]}-{self.density}-{self.list_heads}"
        layout = "" if self.layout == "batched" else f"-{self.layout}"
        if "paged" in self.layout:
            layout += str(self.page_size)
        where = self.device if self.device == "cpu" else f"{self.device}-{self.backend}"
        return (
            f"{where}-{str(self.dtype).removeprefix('torch.')}-d{self.head_dim}"
            f"-{self.batch}x{self.heads[0]}:{self.heads[1]}x{self.seqlen_q}x{self.seqlen_k}"
            f"{'-causal' * self.causal}{window}{index}{'-sink' * self.sink}{layout}"
        )


@dataclass
class Problem:
    """Arguments of one call: ``attention(q, k, v, index, **options)``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    index: BlockIndex | None = None
    options: dict = field(default_factory=dict)

    @property
    def args(self) -> tuple:
        return self.q, self.k, self.v, self.index


def randn(shape, dtype=torch.float32, device="cpu", seed=0) -> torch.Tensor:
    """Normal values that depend on nothing but shape and seed: equal on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def random_block_mask(shape, density, seed=0) -> torch.Tensor:
    """bool mask of ``shape`` whose last dimension holds blocks; "one" = one block per row."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(shape, generator=generator)
    if density == "one":
        return draw == draw.amax(-1, keepdim=True)
    return draw < density


def qkv(device, shape_q, shape_k, dtype=None, seed=0):
    dtype = dtype or DTYPES[device][0]
    q = randn(shape_q, dtype, device, 3 * seed)
    return (
        q,
        randn(shape_k, dtype, device, 3 * seed + 1),
        randn(shape_k, dtype, device, 3 * seed + 2),
    )


def random_index(
    batch, list_heads, seqlen_q, seqlen_k, block=(64, 64), density=0.3, device="cpu", seed=0
) -> BlockIndex:
    shape = (batch, list_heads, -(-seqlen_q // block[0]), -(-seqlen_k // block[1]))
    return BlockIndex.from_dense(random_block_mask(shape, density, seed).to(device), *block)


def build(case: Case) -> Problem:
    """Inputs of a case in the batched layout, the same numbers on every device."""
    num_heads, num_kv_heads = case.heads
    shape_q = (case.batch, num_heads, case.seqlen_q, case.head_dim)
    shape_k = (case.batch, num_kv_heads, case.seqlen_k, case.head_dim)
    where = dict(dtype=case.dtype, device=case.device)
    q = randn(shape_q, seed=3 * case.seed, **where)
    k = randn(shape_k, seed=3 * case.seed + 1, **where)
    v = randn(shape_k, seed=3 * case.seed + 2, **where)
    index = None
    if case.density is not None:
        list_heads = {"q": num_heads, "kv": num_kv_heads, "one": 1}[case.list_heads]
        index = random_index(
            case.batch,
            list_heads,
            case.seqlen_q,
            case.seqlen_k,
            case.block,
            case.density,
            case.device,
            case.seed,
        )
    options = dict(causal=case.causal, window=case.window)
    if case.sink:
        options["sink"] = randn((num_heads,), device=case.device, seed=case.seed + 7)
    return Problem(q, k, v, index, options)


def pairwise(seed: int = 0, **factors) -> list[dict]:
    """Few combinations that contain every pair of values of every two factors (greedy, seeded)."""
    rng = random.Random(seed)
    names = list(factors)
    missing = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in range(len(factors[a]))
        for y in range(len(factors[b]))
    }

    def covered(pick):
        return {(a, pick[a], b, pick[b]) for a, b in itertools.combinations(names, 2)} & missing

    picks = []
    while missing:
        a, x, b, y = min(missing)
        candidates = []
        for _ in range(20):
            pick = {name: rng.randrange(len(factors[name])) for name in names}
            pick[a], pick[b] = x, y
            candidates.append(pick)
        best = max(candidates, key=lambda pick: len(covered(pick)))
        missing -= covered(best)
        picks.append({name: factors[name][i] for name, i in best.items()})
    return picks


def decode_cases(factors: dict) -> list:
    """pytest parameters ``device, pick`` of an op of the decode family, pairwise on each backend.

    `device` names the backend: the fixture that forces it looks there.
    """
    found = []
    for backend in BACKENDS:
        head_dims = (16, 64, 128, 256) if backend == "cpu" else (64, 128)
        picks = pairwise(**factors, dtype=DTYPES[device_of(backend)], head_dim=head_dims)
        marks = backend_marks(backend)
        for i, pick in enumerate(picks):
            found.append(pytest.param(backend, pick, marks=marks, id=f"{backend_id(backend)}-{i}"))
    return found


def params(cases: Iterable[Case], numbered: bool = False) -> list:
    """pytest parameters; each skips with a reason where its backend cannot run.

    ``numbered``: ids end in a number, for lists that may hold equal cases.
    """
    return [
        pytest.param(
            case,
            id=f"{case}-{i}" if numbered else str(case),
            marks=backend_marks(case.backend or "cpu"),
        )
        for i, case in enumerate(cases)
    ]


def every_backend(make: Callable[[str], list[Case]]) -> list:
    """pytest parameters of ``make(backend)`` for each backend that the capability table lists."""
    listed = [backend for backend in BACKENDS if HEAD_DIMS[backend]]
    return params(case for backend in listed for case in make(backend))


def on(backend: str) -> dict:
    """The fields of a Case that say where it runs."""
    return dict(device=device_of(backend), backend=backend)


def capture(run, *arguments):
    """run(*arguments) as a CUDA graph, and the results that its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(*arguments)
    return graph, result
