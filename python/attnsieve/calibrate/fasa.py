"""``python -m attnsieve calibrate fasa``: how well each pair of dims of every head finds keys."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence

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
from attnsieve.fasa_calibration import SHARES

COLUMNS = ("layer", "best pair", "best quarter", "all pairs")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m attnsieve calibrate fasa",
        description="Measures for every head of a model which share of the best keys each pair of "
        "RoPE's dims finds by itself (FASA's contextual agreement).",
    )
    add_subject_options(options)
    options.add_argument(
        "--lengths",
        type=_numbers,
        default=(4096,),
        help="windows of the text in tokens; the mean of them counts (default 4096)",
    )
    options.add_argument(
        "--topk", type=positive, default=256, help="best keys of a row (default %(default)s)"
    )
    options.add_argument(
        "--rows", type=positive, default=64, help="last rows of a window (default %(default)s)"
    )
    options.add_argument(
        "--share", choices=SHARES, default=SHARES[0], help="heads with pairs of their own"
    )
    options.add_argument(
        "--interleaved", action="store_true", help="pairs are neighbouring dims, not halves"
    )
    options.add_argument("-o", "--out", default="fasa.json", help="(default %(default)s)")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrates. Returns 0, or 2 after one line on stderr when the user must act."""
    return run_command("calibrate fasa", _run, parser().parse_args(argv))


def _run(options: argparse.Namespace) -> None:
    # Imported here so that --help and argument errors do not wait for transformers.
    import torch

    import attnsieve
    from attnsieve.demo import model as models
    from attnsieve.fasa_calibration import FASACalibration, contextual_agreement

    models.require("transformers")
    try:
        from attnsieve.demo import measure, report
        from attnsieve.integrations.transformers import register
        from attnsieve.methods import Dense
    except ImportError as error:
        raise DemoError(f"transformers cannot be imported: {models.first_line(error)}") from error

    file = writable(options.out)
    device = device_of(options.device)
    dtype = dtype_of(options.dtype, device)
    text, offset = models.read_text(options.text), offset_of(options)
    register()
    how = {name: getattr(options, name) for name in ("topk", "rows", "share", "interleaved")}

    found: list[list[torch.Tensor]] = []  # of each layer, for each length
    with report.progress(1 + len(options.lengths)) as step:
        step("loading the model")
        subject = models.load_subject(options.model, cache_dir_of(options), dtype, device)
        ids = models.token_window(subject, text, offset, max(options.lengths)).to(device)
        measure.check_subject(subject, ids)
        try:
            for length in options.lengths:
                step(f"{length} tokens")
                layers: list[torch.Tensor] = []
                found.append(layers)

                def observe(call: measure.Call, layers=layers) -> None:
                    layers.append(contextual_agreement(call.q, call.k, **how).mean(0).cpu())

                measure.measure(subject, ids[:, :length], Dense(), repeats=1, observe=observe)
        except (NotImplementedError, ValueError, torch.OutOfMemoryError) as error:
            raise DemoError(models.first_line(error)) from error

    tables = [torch.stack(layer).mean(0).tolist() for layer in zip(*found, strict=True)]
    calibration = FASACalibration(
        model=subject.name,
        version=attnsieve.__version__,
        **how,
        lengths=options.lengths,
        agreement=tuple(tuple(map(tuple, table)) for table in tables),
    )
    calibration.save(file)
    title = f"{subject.name}, {str(dtype).removeprefix('torch.')}, {device_name(device)}"
    notes = ["agreement: found share of the best keys, mean over the heads of a layer."]
    report.print_table(title, COLUMNS, _rows(calibration), notes, left=0)
    print(f"calibration written to {file}")


def _rows(calibration) -> Iterator[tuple[str, ...]]:
    for layer, heads in enumerate(calibration.agreement):
        ranked = [sorted(head, reverse=True) for head in heads]
        parts = (1, max(1, len(ranked[0]) // 4), len(ranked[0]))
        means = (statistics.mean(statistics.mean(x[:n]) for x in ranked) for n in parts)
        yield (str(layer), *(f"{mean:.3f}" for mean in means))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(positive(part) for part in text.split(",")))
