"""Problems in the varlen and paged layouts, and how to take them apart again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from attnsieve.index import BlockIndex
from cases import BAD_IDS, Case, Problem, build, random_index


def tokens_first(x: torch.Tensor) -> torch.Tensor:
    """[1, H, S, D] -> [S, H, D]."""
    return x[0].transpose(0, 1)


def offsets(lengths: list[int], device) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def pack(x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The first ``lengths[b]`` rows of each sequence, packed: [B, H, S, D] -> [T, H, D]."""
    return torch.cat(
        [tokens_first(x[b : b + 1, :, :n]) for b, n in enumerate(lengths)]
    ).contiguous()


def deal_pages(lengths: list[int], max_pages: int, page_size: int, seed: int = 0) -> torch.Tensor:
    """A block table whose pages are shuffled and whose entries past each sequence are garbage."""
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randperm(len(lengths) * max_pages + 2, generator=generator).int()
    table = pages[: len(lengths) * max_pages].view(len(lengths), max_pages)
    for b, length in enumerate(lengths):
        for i, slot in enumerate(range(-(-length // page_size), max_pages)):
            table[b, slot] = (*BAD_IDS, table[0, 0])[(b + i) % (len(BAD_IDS) + 1)]
    return table


def fill_pages(
    x: torch.Tensor, lengths: list[int], table: torch.Tensor, page_size: int, fill: float = math.nan
) -> torch.Tensor:
    """x [B, H, S, D] in a cache [num_pages, page_size, H, D].

    Pages that no sequence owns, and rows of a last page past its sequence, hold ``fill``.
    """
    num_pages = table.numel() + 2
    shape = (num_pages, page_size, x.shape[1], x.shape[3])
    cache = torch.full(shape, fill, dtype=x.dtype, device=x.device)
    for b, length in enumerate(lengths):
        for slot, begin in enumerate(range(0, length, page_size)):
            end = min(begin + page_size, length)
            cache[int(table[b, slot]), : end - begin] = x[b, :, begin:end].transpose(0, 1)
    return cache


def page_bounds(k, page_size):
    """Minima and maxima of pages: [B, H, S, D] -> [B, pages, H, 2, D]."""
    pages = [x.transpose(1, 2) for x in k.split(page_size, dim=2)]
    return torch.stack([torch.stack([x.amin(1), x.amax(1)], 2) for x in pages], 1)


def to_pages(
    problem: Problem, lengths: list[int], page_size: int, seed: int = 0, fill: float = math.nan
) -> Problem:
    """The batched problem with its k and v in pages; sequence b keeps ``lengths[b]`` keys."""
    max_pages = -(-problem.k.shape[2] // page_size)
    table = deal_pages(lengths, max_pages, page_size, seed)
    k, v = (fill_pages(x, lengths, table, page_size, fill) for x in (problem.k, problem.v))
    device = problem.q.device
    pages = dict(block_table=table.to(device), seq_lens=torch.tensor(lengths, device=device).int())
    return Problem(problem.q, k, v, problem.index, problem.options | pages)


def random_lengths(longest: int, batch: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    others = torch.randint(0, longest + 1, (batch - 1,), generator=generator).tolist()
    return [longest, *others]


def build_layout(case: Case) -> Problem:
    """Inputs of a case in its own layout, the same numbers on every device."""
    problem = build(case)
    if case.layout == "batched":
        return problem
    lengths_q = random_lengths(case.seqlen_q, case.batch, case.seed + 1)
    lengths_k = random_lengths(case.seqlen_k, case.batch, case.seed + 2)
    if "paged" in case.layout:
        problem = to_pages(problem, lengths_k, case.page_size, case.seed)
        if case.density is not None:  # lists count blocks up to the end of the last page
            capacity = problem.options["block_table"].shape[1] * case.page_size
            lists = problem.index.counts.shape[:2], case.seqlen_q, capacity
            shape = (*lists[0], *lists[1:])
            problem.index = random_index(*shape, case.block, case.density, case.device, case.seed)
    else:
        problem.k, problem.v = (pack(x, lengths_k) for x in (problem.k, problem.v))
        problem.options["cu_seqlens_k"] = offsets(lengths_k, case.device)
    if "varlen" in case.layout:
        problem.q = pack(problem.q, lengths_q)
        problem.options["cu_seqlens_q"] = offsets(lengths_q, case.device)
    return problem


def _from_pages(cache: torch.Tensor, table: list[int], length: int) -> torch.Tensor:
    pages = [cache[page] for page in table[: -(-length // cache.shape[1])]]
    rows = torch.cat(pages)[:length] if pages else cache.new_zeros(0, *cache.shape[2:])
    return rows.transpose(0, 1)[None]


def sequences_of(problem: Problem) -> Iterator[tuple[Callable, Problem]]:
    """Batched problems that make up ``problem``, each with a function that finds its rows.

    The function maps a tensor laid out like out or lse to its part laid out like the batched
    problem's. Tables must name pages that exist.
    """
    options = dict(problem.options)
    cu_q, cu_k = options.pop("cu_seqlens_q", None), options.pop("cu_seqlens_k", None)
    table, seq_lens = options.pop("block_table", None), options.pop("seq_lens", None)
    if cu_q is None and table is None:
        yield (lambda x: x), problem
        return
    batch = problem.q.shape[0] if cu_q is None else len(cu_q) - 1
    for b in range(batch):
        if cu_q is None:
            rows_of = _batch_entry(b)
        else:
            rows_of = _token_range(int(cu_q[b]), int(cu_q[b + 1]))
        if table is None:
            keys = slice(int(cu_k[b]), int(cu_k[b + 1]))
            k, v = (x[keys].transpose(0, 1)[None] for x in (problem.k, problem.v))
        else:
            length = min(max(int(seq_lens[b]), 0), table.shape[1] * problem.k.shape[1])
            k, v = (_from_pages(x, table[b].tolist(), length) for x in (problem.k, problem.v))
        index = problem.index
        if index is not None and index.counts.shape[0] > 1:
            lists = index.counts[b : b + 1], index.columns[b : b + 1]
            index = replace(index, counts=lists[0], columns=lists[1])
        assert index is None or isinstance(index, BlockIndex)
        yield rows_of, Problem(rows_of(problem.q), k, v, index, options)


def _batch_entry(b: int) -> Callable:
    return lambda x: x[b : b + 1]


def _token_range(begin: int, end: int) -> Callable:
    return lambda x: x[begin:end].transpose(0, 1)[None]
