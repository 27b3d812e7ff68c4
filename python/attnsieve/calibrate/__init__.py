"""``python -m attnsieve calibrate``: which scale factor skips which share of a model's tiles."""

from attnsieve.calibrate.cli import main

__all__ = ["main"]
