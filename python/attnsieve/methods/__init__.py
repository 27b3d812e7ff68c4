"""Attention methods for whole models: each wires score, select and attend for one layer call.

A method is a small frozen dataclass, callable as described in :class:`Method`. Give one to
``attnsieve.integrations.transformers.use``. A new method is a short file in this folder; a new
scorer is a subclass of :class:`BlockMethod` with one function, ``select``.
"""

from attnsieve.methods.base import BlockMethod, Dense, Method
from attnsieve.methods.oracle import OracleTopK, block_mass
from attnsieve.methods.pooled import PooledTopK, PooledTopP
from attnsieve.methods.threshold import Threshold

__all__ = [
    "BlockMethod",
    "Dense",
    "Method",
    "OracleTopK",
    "PooledTopK",
    "PooledTopP",
    "Threshold",
    "block_mass",
]
