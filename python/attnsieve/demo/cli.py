"""Command line of the demo."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from attnsieve.demo.errors import DemoError

DEFAULT_TEXT_OFFSET = 20_000
# The keys of decode.DECODE_FAMILIES, which is imported with transformers.
_DECODE_FAMILIES = ("quest", "tidaldecode", "delta", "recycled", "tokenselect")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m attnsieve demo",
        description="Perplexity, density and attention time of sparse attention methods on a real "
        "causal language model, beside dense attention.",
    )
    options.add_argument(
        "--model",
        help="GGUF file, model folder or hub id (default: $ATTNSIEVE_DEMO_MODEL, else "
        "SmolLM2-135M-Instruct, fetched once)",
    )
    options.add_argument("--text", help="UTF-8 text file (default: Python's help topics)")
    options.add_argument("--length", type=_positive, default=4096, help="tokens (default 4096)")
    options.add_argument(
        "--offset",
        type=_not_negative,
        help=f"first token of the window (default {DEFAULT_TEXT_OFFSET}; 0 with --text)",
    )
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: bfloat16 on CUDA, float32 on a CPU",
    )
    options.add_argument(
        "--methods",
        nargs="*",
        choices=("topk", "topp", "threshold", "oracle"),
        default=["topk", "topp", "threshold", "oracle"],
        help="what to run beside the two dense rows (default: all)",
    )
    options.add_argument(
        "--budgets",
        nargs="+",
        type=_fraction,
        default=[0.5, 0.25],
        help="fractions of the visible blocks for top-k; top-p and the oracle follow",
    )
    options.add_argument(
        "--threshold-scales",
        nargs="+",
        type=_scale,
        default=[100.0, 1000.0],
        help="F of the threshold lambda = F / length",
    )
    options.add_argument(
        "--decode-methods",
        nargs="*",
        choices=_DECODE_FAMILIES,
        default=_DECODE_FAMILIES,
        help="what to run in decode steps beside a dense row (default: all; none: no such rows)",
    )
    options.add_argument(
        "--decode-budgets",
        nargs="+",
        type=_fraction,
        default=[0.125, 0.0625],
        help="kept keys of a decode step as fractions of the length",
    )
    options.add_argument(
        "--decode-tokens",
        type=_positive,
        help="steps per decode row (default: one in 64 tokens of the length, at most 64)",
    )
    options.add_argument(
        "--repeats",
        type=_positive,
        help="timed runs per row, median taken (default: up to 5 within 5 seconds)",
    )
    options.add_argument(
        "--out", default="attnsieve-demo.png", help="picture (default %(default)s)"
    )
    options.add_argument("--no-plot", action="store_true", help="write no picture")
    options.add_argument("--json", help="also write the table as JSON")
    options.add_argument("--cache-dir", help="folder of the fetched model")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo. Returns 0, or 2 after one line on stderr when the user must act."""
    options = parser().parse_args(argv)
    try:
        _run(options)
    except DemoError as error:
        print(f"attnsieve demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("attnsieve demo: interrupted", file=sys.stderr)
        return 130
    return 0


def _kernel_hash() -> str | None:
    import attnsieve

    try:
        return attnsieve.build_info()["kernel_hash"]
    except ImportError:  # no _C for this Python
        return None


def _run(options: argparse.Namespace) -> None:
    # Imported here so that --help and argument errors do not wait for transformers.
    import torch

    from attnsieve.demo import model as models

    models.require("transformers", *([] if options.no_plot else ["matplotlib"]))
    try:
        from attnsieve.demo import decode, measure, plan, report
        from attnsieve.integrations.transformers import register
    except ImportError as error:
        raise DemoError(f"transformers cannot be imported: {models.first_line(error)}") from error

    picture = None if options.no_plot else _writable(options.out)
    json_file = _writable(options.json) if options.json else None
    device = _device(options.device)
    dtype = _dtype(options.dtype, device)
    cache_dir = Path(options.cache_dir) if options.cache_dir else models.default_cache_dir()
    offset = options.offset
    if offset is None:
        offset = 0 if options.text else DEFAULT_TEXT_OFFSET
    text = models.read_text(options.text)
    register()

    total = 1 + plan.count_rows(options.methods, options.budgets, options.threshold_scales)
    total += decode.count_decode_rows(options.decode_methods, options.decode_budgets)
    steps = options.decode_tokens or decode.steps_of(options.length)
    results: list[measure.Result] = []
    scores = plan.PooledScores()
    with report.progress(total) as step:
        step("loading the model")
        subject = models.load_subject(options.model, cache_dir, dtype, device)
        ids = models.token_window(subject, text, offset, options.length).to(device)
        layers = measure.check_subject(subject, ids)

        def add(row: plan.Row, observe=None) -> None:
            step(f"{row.name} {row.budget}".strip())
            try:
                numbers = measure.measure(
                    subject, ids, row.method, repeats=options.repeats, observe=observe
                )
            except (NotImplementedError, torch.OutOfMemoryError) as error:
                raise DemoError(f"{row.name}: {models.first_line(error)}") from error
            results.append(measure.Result(row.name, row.budget, **numbers))

        sdpa, dense = plan.baseline_rows()
        add(sdpa)
        add(dense, observe=scores.observe if "topp" in options.methods else None)
        for row in plan.sparse_rows(
            options.methods, options.budgets, options.threshold_scales, scores
        ):
            add(row)
        decoded = []
        if options.decode_methods:
            families, budgets = options.decode_methods, options.decode_budgets
            decoded = decode.measure_decode(subject, ids, families, budgets, steps, step)

    for result in results:
        result.speedup_vs_sdpa = results[0].attention_ms / result.attention_ms
        result.speedup_vs_dense = results[1].attention_ms / result.attention_ms
    settings = dict(
        model=subject.name,
        layers=layers,
        length=options.length,
        offset=offset,
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        device=_device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        repeats=options.repeats,
        torch=torch.__version__,
        date=datetime.date.today().isoformat(),
        kernel_hash=_kernel_hash(),
    )
    title = (
        f"{subject.name}, {options.length} tokens, {settings['dtype']}, {settings['device']}, "
        f"{layers} layers"
    )
    report.print_table(title, report.COLUMNS, map(report.cells, results), _notes(options))
    if decoded:
        report.print_table(
            f"decode steps, batch 1: the last {steps} tokens",
            report.DECODE_COLUMNS,
            map(report.decode_cells, decoded),
            [
                "perplexity: of the tokens that follow the steps, after a dense prefill. ms/token:",
                "medians of one step. tokens/s and vs dense: of the whole model.",
            ],
        )
        settings["decode_tokens"] = steps
    if json_file is not None:
        report.write_json(json_file, settings, results, decoded)
        print(f"JSON written to {json_file}")
    if picture is not None:
        from attnsieve.demo.plot import write_plot

        write_plot(picture, title, results, decoded)
        print(f"picture written to {picture}")


def _notes(options: argparse.Namespace) -> list[str]:
    notes = [
        "density: kept share of the causal query-key pairs. attn ms: selection and attention",
        "over all layers of one forward pass (total ms). perplexity: all positions.",
    ]
    if "topp" in options.methods:
        notes.append("top-p: p chosen to keep as much as the top-k rows on the dense run's scores.")
    if "oracle" in options.methods:
        notes.append("oracle: blocks of largest true attention mass; finding them is not counted.")
    return notes


def _device(name: str):
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda: torch sees no CUDA device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _device_name(device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _dtype(name: str, device):
    import torch

    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    if name == "float32" and device.type == "cuda":
        raise DemoError("--dtype float32: attnsieve computes bfloat16 and float16 on CUDA")
    return getattr(torch, name)


def _writable(file: str) -> Path:
    """An output path whose folder exists, checked before minutes of work."""
    path = Path(file).expanduser().resolve()
    if path.is_dir() or not path.parent.is_dir():
        raise DemoError(f"cannot write {path}: {'a folder' if path.is_dir() else 'no such folder'}")
    return path


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def _scale(text: str) -> float:
    value = float(text)
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number >= 0")
    return value
