"""The demo's decode rows: teacher-forced steps after one dense prefill, for each method."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from attnsieve.cache import CachedKV
from attnsieve.demo.errors import DemoError
from attnsieve.demo.measure import elapsed_ms, mark, skipped_share
from attnsieve.demo.model import Subject, first_line, rotary_frequencies
from attnsieve.integrations.transformers import use
from attnsieve.integrations.transformers_cache import AttnsievePagedCache
from attnsieve.methods import (
    FASA,
    DecodeMethod,
    Delta,
    DenseDecode,
    LowRank,
    Quest,
    Recycled,
    Squeezed,
    ThresholdDecode,
    TidalDecode,
    TokenSelect,
    TriAttention,
)

# Names for --decode-methods, in the order of the table.
DECODE_FAMILIES = {
    "quest": "Quest",
    "tidaldecode": "TidalDecode",
    "delta": "DELTA",
    "recycled": "Recycled",
    "tokenselect": "TokenSelect",
    "lowrank": "LowRank",
    "fasa": "FASA",
    "squeezed": "Squeezed",
    "triattention": "TriAttention",
    "threshold": "threshold",
}
TWO_PHASE = "threshold 2-phase"
DENSE_DECODE = "dense decode"
PAGE_SIZE = 16
# Pairs of dims that FASA's rows score: 16 numbers of a key, a quarter of SmolLM2's head_dim.
FASA_PAIRS = 8
# Splits of the threshold rows. Each knows the maximum of its own tiles alone: with four, SmolLM2
# skips 0.20 instead of 0.68 of 2048 tokens at F = 1000, with the op's default nothing.
THRESHOLD_SPLITS = 1
WARM_UP_STEPS = 2
# One step in so many tokens of the window, up to a number that keeps a CPU run within minutes.
TOKENS_PER_STEP = 64
MOST_STEPS = 64


@dataclass
class DecodeResult:
    """One decode row. Times are medians over the steps, in milliseconds per token at batch 1.

    budget: keys that a sparse layer keeps at most; Recycled and TriAttention also keep what is
        newer than their lists, Squeezed what is newer than the prompt. For a threshold its lambda.
    perplexity: of the tokens that follow the steps.
    attention_ms: scoring, selecting and attending in all layers. total_ms: the whole model.
    keys: the budget, or of the window's keys the share of tiles that a threshold did not skip.
    skipped: skipped tiles over total ones, of all steps, layers and heads; threshold rows alone.
    """

    method: str
    budget: str
    perplexity: float
    attention_ms: float
    total_ms: float
    tokens_per_s: float
    keys: float
    skipped: float | None = None
    speedup_vs_dense: float = math.nan

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(eq=False)
class _Timed(DecodeMethod):
    """Runs another method and notes the begin and end of each call, and what a threshold skipped.

    ``observe(q, cache, out, options)`` is called after each call, off its clock.
    """

    method: DecodeMethod
    observe: Callable[[Tensor, CachedKV, Tensor, dict], None] | None = None
    marks: list[tuple] = field(default_factory=list)
    counters: list[Tensor] = field(default_factory=list)

    def __call__(
        self, q, cache, *, layer_idx=0, sequence=0, softmax_scale=None, sink=None
    ) -> Tensor:
        options = dict(softmax_scale=softmax_scale, sink=sink)
        begin = mark(q.device)
        if isinstance(self.method, ThresholdDecode):
            out, counters = self.method.counted(q, cache, **options)
            self.counters.append(counters)
        else:
            out = self.method(q, cache, layer_idx=layer_idx, sequence=sequence, **options)
        self.marks.append((begin, mark(q.device)))
        if self.observe is not None:
            self.observe(q, cache, out, options)
        return out

    def reset(self) -> None:
        self.method.reset()


def steps_of(length: int) -> int:
    """Default number of decode steps in a window of ``length`` tokens."""
    return max(1, min(MOST_STEPS, length // TOKENS_PER_STEP))


@dataclass(eq=False)
class _Learners(DenseDecode):
    """Tells ``methods`` of a prefill."""

    methods: Sequence[DecodeMethod] = ()

    def prefill(self, q, k, **place) -> None:
        for method in self.methods:
            method.prefill(q, k, **place)


def recent_of(budget: int) -> int:
    """Newest tokens among the ``budget`` keys of a method that always keeps some."""
    return max(1, budget // 8)


def method_of(family: str, budget: int, length: int, subject: Subject) -> DecodeMethod:
    """A method whose sparse layers keep ``budget`` keys of ``length``, windows included.

    Windows that the papers give for longer texts shrink with the budget: TokenSelect's are 1/16 and
    1/4 of it, DELTA's recent pages and the recent tokens of Squeezed and TriAttention 1/8,
    TriAttention's period 1/16. Squeezed's threshold is the quantile that leaves the budget's share.
    """
    recent = recent_of(budget)
    if family == "quest":
        return Quest(budget, PAGE_SIZE)
    if family == "tidaldecode":
        return TidalDecode(budget)
    if family == "delta":
        return Delta(budget, PAGE_SIZE, recent_pages=max(1, budget // (8 * PAGE_SIZE)))
    if family == "recycled":
        return Recycled(budget)
    if family == "fasa":
        return FASA(budget, FASA_PAIRS)
    if family == "squeezed":
        share = max(0.0, 1.0 - budget / length)
        return Squeezed(share, observed=recent, capacity=budget - recent)
    if family == "triattention":
        frequencies = rotary_frequencies(subject)
        period = max(1, budget // 16)
        return TriAttention(frequencies, budget, period, recent, keep_prompt=False)
    windows = budget // 16, budget // 4
    return TokenSelect(budget - sum(windows), *windows)


def budget_of(fraction: float, length: int) -> int:
    """Keys of a budget that is a share of the window: whole pages, at least three."""
    return max(3, round(fraction * length / PAGE_SIZE)) * PAGE_SIZE


def decode_rows(
    families: Sequence[str],
    budgets: Sequence[float],
    threshold_scales: Sequence[float],
    ranks: Sequence[int],
    length: int,
    subject: Subject,
) -> Iterator[tuple[str, str, DecodeMethod]]:
    """(name, budget, method) of every row, the dense one first; two-phase at the middle scale.

    LowRank has rows of each of ``ranks``, an eighth of a budget the newest tokens.
    """
    yield DENSE_DECODE, "", DenseDecode()
    for family in families:
        if family == "threshold":
            for scale in threshold_scales:
                method = ThresholdDecode(scale, num_splits=THRESHOLD_SPLITS)
                yield DECODE_FAMILIES[family], f"{scale:g}/L", method
            middle = sorted(threshold_scales)[len(threshold_scales) // 2]
            yield TWO_PHASE, f"{middle:g}/L", ThresholdDecode(middle, two_phase=True)
            continue
        kept = [budget_of(fraction, length) for fraction in budgets]
        if family == "lowrank":
            for rank, budget in itertools.product(ranks, kept):
                method = LowRank(budget, rank, recent=recent_of(budget))
                yield f"{DECODE_FAMILIES[family]} r{rank}", str(budget), method
            continue
        for budget in kept:
            method = method_of(family, budget, length, subject)
            yield DECODE_FAMILIES[family], str(budget), method


def count_decode_rows(
    families: Sequence[str],
    budgets: Sequence[float],
    threshold_scales: Sequence[float],
    ranks: Sequence[int],
) -> int:
    """Pieces of work of this part, the prefill included; none without families."""
    if not families:
        return 0
    special = {"threshold": len(threshold_scales) + 1, "lowrank": len(ranks) * len(budgets)}
    return 2 + sum(special.get(family, len(budgets)) for family in families)


@torch.inference_mode()
def prefill(
    subject: Subject, ids: Tensor, steps: int, learner: DecodeMethod | None = None
) -> AttnsievePagedCache:
    """The pages of ``ids`` less the last ``steps + 1`` tokens: the last one is only predicted.

    ``learner`` is told of the prompt's queries and keys.
    """
    length = ids.shape[1]
    if length < steps + 2:
        raise DemoError(f"{steps} decode steps need a window of {steps + 2} tokens or more")
    cache = AttnsievePagedCache(subject.model.config, length, PAGE_SIZE)
    with use(None, subject.model, decode=learner):
        subject.model.base_model(input_ids=ids[:, : length - steps - 1], past_key_values=cache)
    return cache


@torch.inference_mode()
def measure_decode(
    subject: Subject,
    ids: Tensor,
    rows: Iterable[tuple[str, str, DecodeMethod]],
    steps: int,
    announce: Callable[[str], None],
) -> list[DecodeResult]:
    """Every row over the last ``steps`` tokens of ``ids``, from the same prefilled pages.

    Raises:
        DemoError: the window is too short, or a step needs something that has no kernel here.
    """
    announce("decode: prefill")
    results = []
    try:
        rows = list(rows)
        cache = prefill(subject, ids, steps, _Learners([method for _, _, method in rows]))
        for name, budget, method in rows:
            announce(f"{name} {budget}".strip())
            run_steps(subject, ids, cache, method, min(WARM_UP_STEPS, steps))
            numbers = run_steps(subject, ids, cache, method, steps)
            kept = 1.0 if numbers["skipped"] is None else 1.0 - numbers["skipped"]
            keys = int(budget) if budget.isdecimal() else kept * ids.shape[1]
            results.append(DecodeResult(name, budget, keys=keys, **numbers))
    except (NotImplementedError, ValueError, torch.OutOfMemoryError) as error:
        raise DemoError(f"decode: {first_line(error)}") from error
    for result in results:
        result.speedup_vs_dense = result.tokens_per_s / results[0].tokens_per_s
    return results


@torch.inference_mode()
def run_steps(
    subject: Subject,
    ids: Tensor,
    cache: AttnsievePagedCache,
    method: DecodeMethod,
    steps: int,
    observe: Callable[[Tensor, CachedKV, Tensor, dict], None] | None = None,
) -> dict:
    """``steps`` single-token steps after the tokens that the cache holds before and after."""
    timed, head = _Timed(method, observe), subject.model.get_output_embeddings()
    timed.reset()
    prompt = cache.get_seq_length()
    loss, totals = 0.0, []
    with use(None, subject.model, decode=timed):
        for at in range(prompt, prompt + steps):
            begin = mark(ids.device)
            hidden = subject.model.base_model(
                input_ids=ids[:, at : at + 1], past_key_values=cache
            ).last_hidden_state
            logits = head(hidden[0]).float()
            totals.append((begin, mark(ids.device)))
            loss += float(torch.nn.functional.cross_entropy(logits, ids[0, at + 1 : at + 2]))
    cache.crop(-steps)
    layers = len(timed.marks) // steps
    attention = [
        sum(elapsed_ms(*pair) for pair in timed.marks[step * layers : (step + 1) * layers])
        for step in range(steps)
    ]
    total_ms = statistics.median(elapsed_ms(*pair) for pair in totals)
    return dict(
        perplexity=math.exp(loss / steps),
        attention_ms=statistics.median(attention),
        total_ms=total_ms,
        tokens_per_s=1000.0 / total_ms,
        skipped=skipped_share(timed.counters) if timed.counters else None,
    )
