"""What the demo and the calibration share of their command lines: options and their meaning."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from attnsieve.demo.errors import DemoError

DEFAULT_TEXT_OFFSET = 20_000


def add_subject_options(options: argparse.ArgumentParser) -> None:
    """Which model reads which text on which device."""
    options.add_argument(
        "--model",
        help="GGUF file, model folder or hub id (default: $ATTNSIEVE_DEMO_MODEL, else "
        "SmolLM2-135M-Instruct, fetched once)",
    )
    options.add_argument("--text", help="UTF-8 text file (default: Python's help topics)")
    options.add_argument(
        "--offset",
        type=not_negative,
        help=f"first token of the window (default {DEFAULT_TEXT_OFFSET}; 0 with --text)",
    )
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: bfloat16 on CUDA, float32 on a CPU",
    )
    options.add_argument("--cache-dir", help="folder of the fetched model")


def offset_of(options: argparse.Namespace) -> int:
    if options.offset is not None:
        return options.offset
    return 0 if options.text else DEFAULT_TEXT_OFFSET


def cache_dir_of(options: argparse.Namespace) -> Path:
    from attnsieve.demo.model import default_cache_dir

    return Path(options.cache_dir) if options.cache_dir else default_cache_dir()


def kernel_hash() -> str | None:
    import attnsieve

    try:
        return attnsieve.build_info()["kernel_hash"]
    except ImportError:  # no _C for this Python
        return None


def device_of(name: str):
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda: torch sees no CUDA device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def device_name(device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def dtype_of(name: str, device):
    import torch

    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    if name == "float32" and device.type == "cuda":
        raise DemoError("--dtype float32: attnsieve computes bfloat16 and float16 on CUDA")
    return getattr(torch, name)


def writable(file: str) -> Path:
    """An output path whose folder exists, checked before minutes of work."""
    path = Path(file).expanduser().resolve()
    if path.is_dir() or not path.parent.is_dir():
        raise DemoError(f"cannot write {path}: {'a folder' if path.is_dir() else 'no such folder'}")
    return path


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def scale(text: str) -> float:
    value = float(text)
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number >= 0")
    return value
