"""``python -m attnsieve calibrate sale``: the tau of every head at an error budget."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from attnsieve.demo.errors import DemoError, run_command
from attnsieve.demo.options import (
    add_subject_options,
    cache_dir_of,
    device_name,
    device_of,
    dtype_of,
    offset_of,
    positive,
    writable,
)
from attnsieve.tau_calibration import METRICS, PAPER_END, PAPER_START

COLUMNS = ("layer", "dense heads", "smallest tau", "median tau", "largest error")
CHECK_COLUMNS = ("length", "dense ppl", "ppl", "density")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m attnsieve calibrate sale",
        description="Finds SALE's tau for every head of a model: the largest of start, start / 2 "
        "... that keeps the head's output within an error budget of dense attention.",
    )
    add_subject_options(options)
    options.add_argument(
        "--lengths",
        type=_numbers,
        default=(4096,),
        help="windows of the text in tokens; the smallest tau of them counts (default 4096)",
    )
    options.add_argument("--metric", choices=METRICS, default="relative")
    options.add_argument(
        "--budget",
        type=_factor,
        default=0.05,
        help="of a head's error: relative to dense, or (absolute) a mean over rows of the sum of "
        "differences, the paper's, with 0.4 for Llama-3.1-8B (default %(default)s)",
    )
    options.add_argument("--start", type=_factor, default=PAPER_START, help="(default %(default)s)")
    options.add_argument("--end", type=_factor, default=PAPER_END, help="(default %(default)s)")
    options.add_argument("--bits", type=int, choices=(4, 8), default=4)
    options.add_argument("--block-q", type=int, choices=(64, 128), default=64)
    options.add_argument("--block-k", type=int, choices=(16, 32, 64, 128), default=32)
    options.add_argument("--row-stride", type=int, choices=(1, 2, 4, 8), default=1)
    options.add_argument("-o", "--out", default="sale.json", help="(default %(default)s)")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrates. Returns 0, or 2 after one line on stderr when the user must act."""
    return run_command("calibrate sale", _run, parser().parse_args(argv))


def _run(options: argparse.Namespace) -> None:
    # Imported here so that --help and argument errors do not wait for transformers.
    import torch

    import attnsieve
    from attnsieve.demo import model as models
    from attnsieve.tau_calibration import TauCalibration, search_tau

    models.require("transformers")
    try:
        from attnsieve.demo import measure, report
        from attnsieve.integrations.transformers import register
        from attnsieve.methods import SALE, Dense
    except ImportError as error:
        raise DemoError(f"transformers cannot be imported: {models.first_line(error)}") from error

    file = writable(options.out)
    device = device_of(options.device)
    dtype = dtype_of(options.dtype, device)
    text, offset = models.read_text(options.text), offset_of(options)
    register()
    names = ("bits", "block_q", "block_k", "row_stride")
    estimate = {name: getattr(options, name) for name in names}

    with report.progress(1 + 2 * len(options.lengths)) as step:
        step("loading the model")
        subject = models.load_subject(options.model, cache_dir_of(options), dtype, device)
        ids = models.token_window(subject, text, offset, max(options.lengths)).to(device)
        measure.check_subject(subject, ids)
        found: list[list[tuple]] = []  # (taus, errors) of each layer, for each length
        dense_ppl = []
        try:
            for length in options.lengths:
                step(f"search over {length} tokens")
                layers: list[tuple] = []
                found.append(layers)

                def search(call: measure.Call, layers=layers) -> None:
                    if call.sink is not None or call.mask["window"] is not None:
                        raise NotImplementedError("layers with windows or sinks have no tau")
                    layers.append(
                        search_tau(
                            call.q,
                            call.k,
                            call.v,
                            budget=options.budget,
                            metric=options.metric,
                            start=options.start,
                            end=options.end,
                            softmax_scale=call.mask["softmax_scale"],
                            **estimate,
                        )
                    )

                result = measure.measure(
                    subject, ids[:, :length], Dense(), repeats=1, observe=search
                )
                dense_ppl.append(result["perplexity"])
            calibration = TauCalibration(
                model=subject.name,
                version=attnsieve.__version__,
                metric=options.metric,
                budget=options.budget,
                lengths=options.lengths,
                taus=_each_layer(found, 0, torch.amin),
                errors=_each_layer(found, 1, torch.amax),
                **estimate,
            )
            checks = []
            for length, dense in zip(options.lengths, dense_ppl, strict=True):
                step(f"check over {length} tokens")
                method = SALE.calibrated(calibration)
                result = measure.measure(subject, ids[:, :length], method, repeats=1)
                numbers = (dense, result["perplexity"], result["density"])
                checks.append((str(length), *(f"{x:.3f}" for x in numbers)))
        except (NotImplementedError, ValueError, torch.OutOfMemoryError) as error:
            raise DemoError(models.first_line(error)) from error

    calibration.save(file)
    title = f"{subject.name}, {str(dtype).removeprefix('torch.')}, {device_name(device)}"
    notes = [f"errors: {options.metric}, budget {options.budget:g}; dense heads have tau 0."]
    report.print_table(title, COLUMNS, _rows(calibration), notes, left=0)
    report.print_table("with these thresholds", CHECK_COLUMNS, checks, [], left=0)
    print(f"calibration written to {file}")


def _each_layer(found: list[list[tuple]], which: int, over) -> tuple[tuple[float, ...], ...]:
    """Of each layer the numbers of its heads, reduced over the lengths."""
    import torch

    layers = zip(*found, strict=True)
    tables = (torch.stack([numbers[which] for numbers in layer]) for layer in layers)
    return tuple(tuple(over(table, 0).tolist()) for table in tables)


def _rows(calibration):
    for layer, (taus, errors) in enumerate(zip(calibration.taus, calibration.errors, strict=True)):
        dense = sum(tau == 0 for tau in taus)
        yield (
            str(layer),
            str(dense),
            f"{min(taus):.3g}",
            f"{statistics.median(taus):.3g}",
            f"{max(errors):.4f}",
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(positive(part) for part in text.split(",")))


def _factor(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number > 0")
    return value
