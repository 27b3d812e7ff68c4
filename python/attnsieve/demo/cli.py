"""Command line of the demo."""

from __future__ import annotations

import argparse
import datetime
import hashlib
from collections.abc import Sequence

from attnsieve.demo.errors import DemoError, run_command
from attnsieve.demo.options import (
    add_subject_options,
    cache_dir_of,
    device_name,
    device_of,
    dtype_of,
    fraction,
    kernel_hash,
    offset_of,
    positive,
    scale,
    writable,
)

# The keys of plan.FAMILIES and decode.DECODE_FAMILIES, which are imported with torch.
_FAMILIES = ("topk", "topp", "sale", "xattention", "spargeattn", "threshold", "oracle")
_DECODE_FAMILIES = (
    "quest",
    "tidaldecode",
    "delta",
    "recycled",
    "tokenselect",
    "lowrank",
    "fasa",
    "squeezed",
    "triattention",
    "threshold",
)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m attnsieve demo",
        description="Perplexity, density and attention time of sparse attention methods on a real "
        "causal language model, beside dense attention.",
    )
    add_subject_options(options)
    options.add_argument("--length", type=positive, default=4096, help="tokens (default 4096)")
    options.add_argument(
        "--methods",
        nargs="*",
        choices=_FAMILIES,
        default=_FAMILIES,
        help="what to run beside the two dense rows (default: all)",
    )
    options.add_argument(
        "--budgets",
        nargs="+",
        type=fraction,
        default=[0.5, 0.25],
        help="fractions of the visible blocks for top-k; top-p and the oracle follow",
    )
    options.add_argument(
        "--threshold-scales",
        nargs="+",
        type=scale,
        default=[10.0, 100.0, 300.0, 600.0, 1000.0, 3000.0, 10000.0],
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
        type=fraction,
        default=[0.125, 0.0625],
        help="kept keys of a decode step as fractions of the length",
    )
    options.add_argument(
        "--decode-threshold-scales",
        nargs="+",
        type=scale,
        default=[10.0, 100.0, 1000.0],
        help="F of the threshold in decode steps",
    )
    options.add_argument(
        "--ranks",
        nargs="+",
        type=positive,
        default=[16, 32],
        help="numbers of a key that LowRank scores in decode steps: multiples of 8",
    )
    options.add_argument(
        "--decode-tokens",
        type=positive,
        help="steps per decode row (default: one in 64 tokens of the length, at most 64)",
    )
    options.add_argument(
        "--repeats",
        type=positive,
        help="timed runs per row, median taken (default: up to 5 within 5 seconds)",
    )
    options.add_argument(
        "--out", default="attnsieve-demo.png", help="picture (default %(default)s)"
    )
    options.add_argument("--no-plot", action="store_true", help="write no picture")
    options.add_argument("--json", help="also write the table as JSON")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo. Returns 0, or 2 after one line on stderr when the user must act."""
    return run_command("demo", _run, parser().parse_args(argv))


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

    picture = None if options.no_plot else writable(options.out)
    json_file = writable(options.json) if options.json else None
    device = device_of(options.device)
    dtype = dtype_of(options.dtype, device)
    text, offset = models.read_text(options.text), offset_of(options)
    register()

    total = 1 + plan.count_rows(options.methods, options.budgets, options.threshold_scales)
    decode_options = (
        options.decode_methods,
        options.decode_budgets,
        options.decode_threshold_scales,
        options.ranks,
    )
    total += decode.count_decode_rows(*decode_options)
    steps = options.decode_tokens or decode.steps_of(options.length)
    results: list[measure.Result] = []
    scores = plan.PooledScores()
    with report.progress(total) as step:
        step("loading the model")
        subject = models.load_subject(options.model, cache_dir_of(options), dtype, device)
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
            rows = decode.decode_rows(*decode_options, options.length, subject)
            decoded = decode.measure_decode(subject, ids, rows, steps, step)

    for result in results:
        result.speedup_vs_sdpa = results[0].attention_ms / result.attention_ms
        result.speedup_vs_dense = results[1].attention_ms / result.attention_ms
    settings = dict(
        model=subject.name,
        layers=layers,
        length=options.length,
        offset=offset,
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        repeats=options.repeats,
        torch=torch.__version__,
        date=datetime.date.today().isoformat(),
        kernel_hash=kernel_hash(),
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
                "ppl: perplexity of the tokens that follow the steps, after a dense prefill. ms:",
                "medians of one step. tokens/s and vs dense: of the whole model. skipped: tiles",
                "whose values were not read.",
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
        "over all layers of one forward pass. select: the selection's share of it. ppl:",
        "perplexity of all positions.",
    ]
    if "threshold" in options.methods:
        notes.append("skipped: tiles that lambda = F / length skipped, over all visited ones.")
    if "topp" in options.methods:
        notes.append("top-p: p chosen to keep as much as the top-k rows on the dense run's scores.")
    if "oracle" in options.methods:
        notes.append("oracle: blocks of largest true attention mass; finding them is not counted.")
    return notes
