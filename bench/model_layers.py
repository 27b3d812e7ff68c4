"""The demo's model on the CPU, layer by layer: what the scripts that look into it share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import results
from attnsieve.demo import measure, model
from attnsieve.demo.options import DEFAULT_TEXT_OFFSET
from attnsieve.integrations.transformers import register
from attnsieve.methods import Dense


def options(description: str, length: int) -> argparse.ArgumentParser:
    """The arguments that :func:`observe` reads."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--length", type=int, default=length)
    found.add_argument("--every", type=int, default=1, help="every how-manieth layer")
    found.add_argument("--json", type=Path)
    return found


def numbers(text: str) -> tuple[int, ...]:
    """A list such as ``16,32``."""
    return tuple(int(part) for part in text.split(","))


def load(length: int) -> tuple[model.Subject, Tensor]:
    """The model in float32 and the demo's window of its text."""
    register()
    subject = model.load_subject(
        None, model.default_cache_dir(), torch.float32, torch.device("cpu")
    )
    return subject, model.token_window(subject, model.read_text(None), DEFAULT_TEXT_OFFSET, length)


def write(chosen: argparse.Namespace, settings: tuple[str, ...], **found) -> None:
    """With ``--json``, ``found`` beside the arguments that ``settings`` names."""
    if chosen.json:
        record = {name: getattr(chosen, name) for name in settings}
        record |= dict(date=results.today(), kernel_hash=results.current_hash(), **found)
        chosen.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def observe(
    chosen: argparse.Namespace, settings: tuple[str, ...], look: Callable[[int, measure.Call], dict]
) -> list[dict]:
    """What ``look(number, call)`` says of each layer of a dense pass; written by :func:`write`."""
    subject, ids = load(chosen.length)
    rows: list[dict] = []
    seen = 0

    def count(call: measure.Call) -> None:
        nonlocal seen
        number, seen = seen, seen + 1
        if number % chosen.every == 0:
            rows.append(dict(layer=number, **look(number, call)))

    measure.measure(subject, ids, Dense(), repeats=1, observe=count)
    write(chosen, settings, layers=rows)
    return rows
