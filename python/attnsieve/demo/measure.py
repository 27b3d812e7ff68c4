"""What the demo measures: perplexity, density and time, one row per method and budget."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from attnsieve import threshold_attention
from attnsieve.demo.errors import DemoError
from attnsieve.demo.model import Subject, first_line
from attnsieve.integrations.transformers import use
from attnsieve.methods import BlockMethod, Method, OracleTopK, Threshold

# Group and unit of the threshold rule: rows that share a decision.
GROUP_ROWS = 64
# Rows of logits held at once: 256 x 49152 float32 logits are 50 MB.
LOGIT_ROWS = 256
# Tokens of the warm-up run on a CPU; on a GPU every row warms up at its full length.
WARM_UP_TOKENS = 256
# Without --repeats a row is timed this often, or until so many seconds have passed.
DEFAULT_RUNS = 5
DEFAULT_SECONDS = 5.0


@dataclass
class Result:
    """One row of the demo's table. Times are in milliseconds, summed over the model's layers.

    density: kept (query, key) pairs over the pairs a causal model may use, mean over layers.
    skipped: skipped tiles over total ones, of all layers and heads together; threshold rows alone.
    attention_ms: selection and attention; the oracle's selection counts nowhere.
    select_ms: the part of attention_ms before attention proper.
    total_ms: the whole forward pass without the language-model head.
    """

    method: str
    budget: str
    density: float
    perplexity: float
    attention_ms: float
    select_ms: float
    total_ms: float
    skipped: float | None = None
    speedup_vs_dense: float = math.nan
    speedup_vs_sdpa: float = math.nan

    def as_dict(self) -> dict:
        return asdict(self)


class TorchSdpa(Method):
    """Dense attention of torch, the yardstick of speed and of perplexity."""

    min_seqlen_q = 0

    def __call__(
        self, q, k, v, *, causal, window=None, softmax_scale=None, sink=None, layer_idx=None
    ) -> Tensor:
        if window is not None or sink is not None or q.shape[2] != k.shape[2]:
            raise NotImplementedError(
                "the demo compares with torch SDPA, which has no windows and no sinks"
            )
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )


@dataclass(frozen=True)
class Call:
    """One layer's attention as an observer sees it; ``mask``: causal, window, softmax_scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    sink: Tensor | None
    mask: dict


Observer = Callable[[Call], None]


@dataclass
class Meter(Method):
    """Runs another method and notes, per layer, its time and what it kept.

    The clock runs around selection and attention only. Densities are computed after the forward
    pass, from the index or the counters that each layer left, so they cost none of the time.
    """

    method: Method
    observe: Observer | None = None
    marks: list[tuple] = field(default_factory=list)
    pauses: list[tuple] = field(default_factory=list)
    kept: list[Callable[[], float]] = field(default_factory=list)
    counters: list[Tensor] = field(default_factory=list)

    min_seqlen_q = 0

    def __call__(
        self, q, k, v, *, causal, window=None, softmax_scale=None, sink=None, layer_idx=None
    ) -> Tensor:
        if not causal:
            raise NotImplementedError("the demo measures causal language models")
        mask = dict(causal=causal, window=window, softmax_scale=softmax_scale)
        seqlen_q, seqlen_k = q.shape[2], k.shape[2]
        begin = mark(q.device)
        if isinstance(self.method, BlockMethod):
            index = self.method.select(q, k, layer_idx=layer_idx, **mask)
            selected = mark(q.device)
            out = self.method.attend(q, k, v, index, sink=sink, **mask)
            kept = dict(causal=causal, window=window)
            self.kept.append(lambda: float(index.density(seqlen_q, seqlen_k, **kept)))
        elif isinstance(self.method, Threshold):
            selected = begin
            out, counters = threshold_attention(
                q,
                k,
                v,
                self.method.threshold(seqlen_k),
                skip_block=self.method.skip_block,
                sink=sink,
                return_counters=True,
                **mask,
            )
            self.counters.append(counters)
            self.kept.append(lambda: _share_of_tiles(counters, seqlen_q, self.method.skip_block))
        else:
            selected = begin
            out = self.method(q, k, v, sink=sink, layer_idx=layer_idx, **mask)
            self.kept.append(lambda: 1.0)
        end = mark(q.device)
        self.marks.append((begin, selected, end))
        if self.observe is not None:
            self.observe(Call(q, k, v, out, sink, mask))
            self.pauses.append((end, mark(q.device)))
        return out

    def times_ms(self) -> tuple[float, float, float]:
        """Selection, selection with attention, and time spent observing, over all calls."""
        select = sum(elapsed_ms(a, b) for a, b, _ in self.marks)
        attention = sum(elapsed_ms(a, c) for a, _, c in self.marks)
        return select, attention, sum(elapsed_ms(a, b) for a, b in self.pauses)

    def density(self) -> float:
        return statistics.fmean(kept() for kept in self.kept)

    def skipped(self) -> float | None:
        """Skipped tiles over total ones, None without a threshold."""
        return skipped_share(self.counters) if self.counters else None


def skipped_share(counters: Sequence[Tensor]) -> float:
    """Skipped over total, of the (skipped, total) counters of several calls together."""
    skipped, total = torch.stack([x.reshape(-1, 2).sum(0) for x in counters]).sum(0).tolist()
    return skipped / total


def mark(device: torch.device):
    """A point in time on ``device``, for :func:`elapsed_ms`."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(begin, end) -> float:
    """Milliseconds between two marks; on a GPU after it has reached both."""
    if isinstance(begin, float):
        return (end - begin) * 1e3
    return begin.elapsed_time(end)


def _share_of_tiles(counters: Tensor, seqlen: int, skip_block: int) -> float:
    """Kept share of the causal pairs, from the (skipped, total) tiles of a threshold call.

    A group's only tile with hidden pairs is its first visited one, which is never skipped: every
    skipped tile is GROUP_ROWS x skip_block visible pairs (fewer rows in a ragged last group, which
    this leaves out of account).
    """
    pairs = seqlen * (seqlen + 1) / 2 * counters[..., 0].numel()
    skipped = float(counters[..., 0].sum()) * GROUP_ROWS * skip_block
    return max(0.0, 1.0 - skipped / pairs)


def measure(
    subject: Subject,
    ids: Tensor,
    method: Method,
    *,
    repeats: int | None = None,
    observe: Observer | None = None,
) -> dict:
    """Perplexity, density and median times of one method over ``ids``.

    ``observe`` is called for each layer of the first run, off the clock.
    """
    device = ids.device
    warm_up = ids if device.type == "cuda" else ids[:, :WARM_UP_TOKENS]
    forward(subject, warm_up, Meter(method))
    runs = []
    started = time.monotonic()
    while len(runs) < (repeats or DEFAULT_RUNS):
        if repeats is None and runs and time.monotonic() - started > DEFAULT_SECONDS:
            break
        meter = Meter(method, None if runs else observe)
        hidden, total_ms = forward(subject, ids, meter)
        select_ms, attention_ms, observed_ms = meter.times_ms()
        if isinstance(method, OracleTopK):
            # No one can have this selection; its cost says nothing about the method.
            attention_ms, total_ms = attention_ms - select_ms, total_ms - select_ms
            select_ms = 0.0
        runs.append((select_ms, attention_ms, total_ms - observed_ms))
    medians = (statistics.median(column) for column in zip(*runs, strict=True))
    select_ms, attention_ms, total_ms = medians
    return dict(
        density=meter.density(),
        skipped=meter.skipped(),
        perplexity=perplexity(subject, hidden, ids),
        attention_ms=attention_ms,
        select_ms=select_ms,
        total_ms=total_ms,
    )


def forward(subject: Subject, ids: Tensor, method: Method) -> tuple[Tensor, float]:
    """Hidden states ``[L, hidden]`` of the decoder and the pass's time in milliseconds."""
    with use(method, subject.model), torch.inference_mode():
        begin = mark(ids.device)
        hidden = subject.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        end = mark(ids.device)
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
    return hidden, elapsed_ms(begin, end)


@torch.inference_mode()
def perplexity(subject: Subject, hidden: Tensor, ids: Tensor) -> float:
    """Teacher-forced perplexity over all positions; logits exist for a few rows at a time."""
    head = subject.model.get_output_embeddings()
    targets = ids[0, 1:]
    loss = 0.0
    for rows, labels in zip(hidden[:-1].split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        logits = head(rows).float()
        loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return math.exp(loss / len(targets))


@torch.inference_mode()
def check_subject(subject: Subject, ids: Tensor) -> int:
    """Runs a short prefix densely and checks what the measurements rely on; returns the layers.

    Raises:
        DemoError: attention does not pass through attnsieve or needs something it refuses, or the
            logits are not the head's output alone.
    """
    prefix = ids[:, :WARM_UP_TOKENS]
    meter = Meter(TorchSdpa())
    try:
        hidden, _ = forward(subject, prefix, meter)
        with use(meter, subject.model):
            logits = subject.model(input_ids=prefix, use_cache=False).logits[0, -1]
        forward(subject, prefix, Meter(Threshold(0.0)))
    except (NotImplementedError, TypeError, ValueError, AttributeError) as error:
        raise DemoError(f"{subject.name} cannot run in the demo: {first_line(error)}") from error
    layers = len(meter.kept) // 2
    if layers == 0:
        raise DemoError(f"{subject.name} does not call attention through transformers' interface")
    plain = subject.model.get_output_embeddings()(hidden[-1])
    if not torch.allclose(plain.float(), logits.float(), rtol=1e-2, atol=1e-2):
        raise DemoError(f"{subject.name} rescales its logits, which the demo does not measure")
    return layers
