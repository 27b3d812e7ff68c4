"""Command line of the calibration."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from attnsieve.calibration import PHASES, Calibration
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

# Decode takes smaller factors: fewer rows have to agree.
DEFAULT_SCALES = "1,3,10,30,100,300,1000,3000,10000"
DEFAULT_DECODE_SCALES = "0.1,0.3,1,3,10,30,100,300,1000,3000"
SWEEP_COLUMNS = ("length", "F", "skipped", "error", "ppl")
CHECK_COLUMNS = ("target", "length", "F", "skipped", "error", "ppl")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m attnsieve calibrate",
        description="Measures which share of a model's tiles a threshold F / length skips, fits "
        "F = a * exp(b * share), and runs the fitted factors. `calibrate sale --help` tells of "
        "SALE's thresholds, `calibrate fasa --help` of FASA's pairs of dims.",
    )
    add_subject_options(options)
    options.add_argument(
        "--lengths",
        type=_list(positive),
        default="1024,2048,4096",
        help="windows in tokens (default %(default)s)",
    )
    options.add_argument(
        "--phases",
        type=_list(_phase),
        default="prefill,decode",
        help="what to calibrate (default %(default)s)",
    )
    options.add_argument(
        "--scales",
        type=_list(_factor),
        default=DEFAULT_SCALES,
        help="F of the prefill sweep (default %(default)s)",
    )
    options.add_argument(
        "--decode-scales",
        type=_list(_factor),
        default=DEFAULT_DECODE_SCALES,
        help="F of the decode sweep (default %(default)s)",
    )
    options.add_argument(
        "--targets",
        type=_list(_share),
        default="0.3,0.5,0.7",
        help="shares to run at the fitted factors (default %(default)s)",
    )
    options.add_argument(
        "--steps", type=positive, default=16, help="decode steps per run (default %(default)s)"
    )
    options.add_argument(
        "--num-splits",
        type=positive,
        default=1,
        help="visiting sequences of a decode step, which the shares hold for (default %(default)s)",
    )
    options.add_argument(
        "-o", "--out", default="calibration.json", help="the calibration (default %(default)s)"
    )
    options.add_argument("--plot", help="also write a picture of the sweep")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrates. Returns 0, or 2 after one line on stderr when the user must act."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["sale"]:
        from attnsieve.calibrate.sale import main as calibrate_sale

        return calibrate_sale(arguments[1:])
    if arguments[:1] == ["fasa"]:
        from attnsieve.calibrate.fasa import main as calibrate_fasa

        return calibrate_fasa(arguments[1:])
    return run_command("calibrate", _run, parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    # Imported here so that --help and argument errors do not wait for transformers.
    import torch

    import attnsieve
    from attnsieve.demo import model as models

    models.require("transformers")
    try:
        from attnsieve.calibrate import sweep
        from attnsieve.demo import measure, report
        from attnsieve.integrations.transformers import register
        from attnsieve.methods import Threshold
    except ImportError as error:
        raise DemoError(f"transformers cannot be imported: {models.first_line(error)}") from error

    file, picture = writable(options.out), writable(options.plot) if options.plot else None
    device = device_of(options.device)
    dtype = dtype_of(options.dtype, device)
    text, offset = models.read_text(options.text), offset_of(options)
    register()

    scales = dict(prefill=options.scales, decode=options.decode_scales)
    count = sum(1 + len(scales[phase]) + len(options.targets) for phase in options.phases)
    sweeps: dict[str, sweep.Sweep] = {}
    with report.progress(1 + count * len(options.lengths)) as step:
        step("loading the model")
        subject = models.load_subject(options.model, cache_dir_of(options), dtype, device)
        ids = models.token_window(subject, text, offset, max(options.lengths)).to(device)
        measure.check_subject(subject, ids)
        make = dict(
            prefill=lambda window: sweep.prefill_run(subject, window),
            decode=lambda window: sweep.decode_run(
                subject, window, options.steps, options.num_splits
            ),
        )
        try:
            for phase in options.phases:
                runs = {length: make[phase](ids[:, :length]) for length in options.lengths}
                sweeps[phase] = sweep.sweep(phase, runs, scales[phase], options.targets, step)
        except (NotImplementedError, ValueError, torch.OutOfMemoryError) as error:
            raise DemoError(f"{phase}: {models.first_line(error)}") from error

    title = f"{subject.name}, {str(dtype).removeprefix('torch.')}, {device_name(device)}"
    for phase, swept in sweeps.items():
        _print(f"{phase}: {title}", swept)
    Calibration(
        model=subject.name,
        version=attnsieve.__version__,
        skip_block=Threshold(0.0).skip_block,
        group_rows=measure.GROUP_ROWS,
        num_splits=options.num_splits,
        phases={phase: swept.fit for phase, swept in sweeps.items()},
    ).save(file)
    print(f"calibration written to {file}")
    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed; pip install 'attnsieve[demo]'")
    elif picture is not None:
        from attnsieve.calibrate.plot import write_plot

        write_plot(picture, title, sweeps)
        print(f"picture written to {picture}")


def _print(title: str, swept) -> None:
    """The sweep with its fit, and what the fitted factors did."""
    from attnsieve.demo.report import print_table

    fit = swept.fit
    notes = [
        f"F = {fit.a:.4g} * exp({fit.b:.4g} * share); rms error of ln F {fit.rms_log_scale:.3f}, "
        f"of a share at most {fit.max_share_error:.3f}",
        "skipped: tiles that F / length skipped, over all visited ones. error: of attention",
        "outputs, relative to dense attention of the same inputs, mean over layers.",
    ]
    print_table(title, SWEEP_COLUMNS, map(_cells, swept.samples), notes, left=0)
    rows = [(f"{target:g}", *_cells(sample)) for target, sample in swept.checks]
    print_table("targets, at their fitted F", CHECK_COLUMNS, rows, swept.refused, left=0)


def _cells(sample) -> tuple[str, ...]:
    return (
        str(sample.length),
        f"{sample.scale:.5g}",
        f"{sample.share:.3f}",
        f"{sample.error:.4f}",
        f"{sample.perplexity:.3f}",
    )


def _list(kind: Callable[[str], Any]) -> Callable[[str], tuple]:
    """Comma-separated values, each once."""

    def values(text: str) -> tuple:
        try:
            return tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",")))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text}: {error}") from error

    return values


def _phase(text: str) -> str:
    if text not in PHASES:
        raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(PHASES)}")
    return text


def _factor(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number > 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1)")
    return value
