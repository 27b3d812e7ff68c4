"""Loads libattnsieve.so (the torch ops) at import, and the _C module when it is first asked for."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import torch

LIBRARY = "libattnsieve.so"


def load_ops() -> None:
    """Register the ops. Looks in every folder of the package: editable installs have two."""
    package = importlib.import_module("attnsieve")
    candidates = [Path(folder) / LIBRARY for folder in package.__path__]
    for path in candidates:
        if path.exists():
            torch.ops.load_library(str(path))
            return
    raise ImportError(
        f"{LIBRARY} is missing (looked in {', '.join(str(p.parent) for p in candidates)}); "
        "install attnsieve with pip"
    )


def info_module() -> ModuleType:
    """The pybind11 module ``attnsieve._C``; a clear ImportError where it was not built."""
    try:
        return importlib.import_module("attnsieve._C")
    except ImportError as error:
        raise ImportError(
            "attnsieve._C was not built for this Python; build info and kernel attributes need it, "
            f"the ops do not ({error})"
        ) from error
