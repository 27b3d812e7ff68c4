"""``python -m attnsieve demo``: what sparse attention saves and costs on a real language model."""

from attnsieve.demo.cli import main

__all__ = ["main"]
