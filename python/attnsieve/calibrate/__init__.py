"""``python -m attnsieve calibrate``: which scale factor skips which share of a model's tiles.

``calibrate sale``: which tau every head can have at an error budget. ``calibrate fasa``: which RoPE
frequencies of every head find its best keys.
"""

from attnsieve.calibrate.cli import main

__all__ = ["main"]
