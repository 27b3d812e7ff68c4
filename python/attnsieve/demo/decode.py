"""The demo's decode rows: teacher-forced steps after one dense prefill, for each method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from attnsieve.demo.errors import DemoError
from attnsieve.demo.measure import elapsed_ms, mark
from attnsieve.demo.model import Subject, first_line
from attnsieve.integrations.transformers import use
from attnsieve.integrations.transformers_cache import AttnsievePagedCache
from attnsieve.methods import (
    DecodeMethod,
    Delta,
    DenseDecode,
    Quest,
    Recycled,
    TidalDecode,
    TokenSelect,
)

# Names for --decode-methods, in the order of the table.
DECODE_FAMILIES = {
    "quest": "Quest",
    "tidaldecode": "TidalDecode",
    "delta": "DELTA",
    "recycled": "Recycled",
    "tokenselect": "TokenSelect",
}
DENSE_DECODE = "dense decode"
PAGE_SIZE = 16
WARM_UP_STEPS = 2
# One step in so many tokens of the window, up to a number that keeps a CPU run within minutes.
TOKENS_PER_STEP = 64
MOST_STEPS = 64


@dataclass
class DecodeResult:
    """One decode row. Times are medians over the steps, in milliseconds per token at batch 1.

    budget: keys that a sparse layer keeps at most; Recycled also keeps what is newer than its list.
    perplexity: of the tokens that follow the steps.
    attention_ms: scoring, selecting and attending in all layers. total_ms: the whole model.
    """

    method: str
    budget: str
    perplexity: float
    attention_ms: float
    total_ms: float
    tokens_per_s: float
    speedup_vs_dense: float = math.nan

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(eq=False)
class _Timed(DecodeMethod):
    """Runs another method and notes the begin and end of each call."""

    method: DecodeMethod
    marks: list[tuple] = field(default_factory=list)

    def __call__(self, q, cache, **options) -> Tensor:
        begin = mark(q.device)
        out = self.method(q, cache, **options)
        self.marks.append((begin, mark(q.device)))
        return out

    def reset(self) -> None:
        self.method.reset()


def steps_of(length: int) -> int:
    """Default number of decode steps in a window of ``length`` tokens."""
    return max(1, min(MOST_STEPS, length // TOKENS_PER_STEP))


def method_of(family: str, budget: int) -> DecodeMethod:
    """A method whose sparse layers keep ``budget`` keys, windows included.

    Windows that the papers give for longer texts shrink with the budget: TokenSelect's are 1/16 and
    1/4 of it, DELTA's recent pages 1/8.
    """
    if family == "quest":
        return Quest(budget, PAGE_SIZE)
    if family == "tidaldecode":
        return TidalDecode(budget)
    if family == "delta":
        return Delta(budget, PAGE_SIZE, recent_pages=max(1, budget // (8 * PAGE_SIZE)))
    if family == "recycled":
        return Recycled(budget)
    windows = budget // 16, budget // 4
    return TokenSelect(budget - sum(windows), *windows)


def budget_of(fraction: float, length: int) -> int:
    """Keys of a budget that is a share of the window: whole pages, at least three."""
    return max(3, round(fraction * length / PAGE_SIZE)) * PAGE_SIZE


def decode_rows(
    families: Sequence[str], budgets: Sequence[float], length: int
) -> Iterator[tuple[str, str, DecodeMethod]]:
    """(name, budget, method) of every row, the dense one first."""
    yield DENSE_DECODE, "", DenseDecode()
    for family in families:
        for fraction in budgets:
            budget = budget_of(fraction, length)
            yield DECODE_FAMILIES[family], str(budget), method_of(family, budget)


def count_decode_rows(families: Sequence[str], budgets: Sequence[float]) -> int:
    """Pieces of work of this part, the prefill included; none without families."""
    return 2 + len(families) * len(budgets) if families else 0


@torch.inference_mode()
def measure_decode(
    subject: Subject,
    ids: Tensor,
    families: Sequence[str],
    budgets: Sequence[float],
    steps: int,
    announce: Callable[[str], None],
) -> list[DecodeResult]:
    """Every row over the last ``steps`` tokens of ``ids``, from the same prefilled pages.

    Raises:
        DemoError: the window is too short, or a step needs something that has no kernel here.
    """
    length = ids.shape[1]
    if length < steps + 2:
        raise DemoError(f"--decode-tokens {steps} needs a window of {steps + 2} tokens or more")
    announce("decode: prefill")
    cache = AttnsievePagedCache(subject.model.config, length, PAGE_SIZE)
    prompt = length - steps - 1  # the last token is only predicted
    results = []
    try:
        with use(None, subject.model):
            subject.model.base_model(input_ids=ids[:, :prompt], past_key_values=cache)
        for name, budget, method in decode_rows(families, budgets, length):
            announce(f"{name} {budget}".strip())
            _run(subject, ids, cache, method, prompt, min(WARM_UP_STEPS, steps))
            numbers = _run(subject, ids, cache, method, prompt, steps)
            results.append(DecodeResult(name, budget, **numbers))
    except (NotImplementedError, ValueError, torch.OutOfMemoryError) as error:
        raise DemoError(f"decode: {first_line(error)}") from error
    for result in results:
        result.speedup_vs_dense = result.tokens_per_s / results[0].tokens_per_s
    return results


def _run(
    subject: Subject,
    ids: Tensor,
    cache: AttnsievePagedCache,
    method: DecodeMethod,
    prompt: int,
    steps: int,
) -> dict[str, float]:
    """``steps`` single-token steps after the prompt, which the cache holds before and after."""
    timed, head = _Timed(method), subject.model.get_output_embeddings()
    timed.reset()
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
    )
