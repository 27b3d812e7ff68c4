"""Attention methods for whole models: each wires score, select and attend for one layer call.

A method is a small frozen dataclass, callable as described in :class:`Method`. Give one to
``attnsieve.integrations.transformers.use``. A new method is a short file in this folder; a new
scorer is a subclass of :class:`BlockMethod` with one function, ``select``.

Decode steps have methods of their own, :class:`DecodeMethod`: over a layer's cached keys, with what
they remember in ``state``.
"""

from attnsieve.methods.base import BlockMethod, Dense, Method
from attnsieve.methods.decode import MAX_DECODE_ROWS, DecodeMethod, DenseDecode
from attnsieve.methods.delta import Delta
from attnsieve.methods.dsa import DSA
from attnsieve.methods.fasa import FASA
from attnsieve.methods.lowrank import LowRank
from attnsieve.methods.oracle import OracleTopK, block_mass
from attnsieve.methods.pooled import PooledTopK, PooledTopP
from attnsieve.methods.quest import Quest
from attnsieve.methods.recycled import Recycled
from attnsieve.methods.sale import SALE
from attnsieve.methods.spargeattn import SpargeAttn, self_similarity
from attnsieve.methods.squeezed import Squeezed
from attnsieve.methods.threshold import Threshold, ThresholdDecode
from attnsieve.methods.tidaldecode import TidalDecode
from attnsieve.methods.tokenselect import TokenSelect
from attnsieve.methods.triattention import QueryCentres, TriAttention, query_centres
from attnsieve.methods.xattention import XAttention, antidiagonal_mass

__all__ = [
    "DSA",
    "FASA",
    "MAX_DECODE_ROWS",
    "BlockMethod",
    "DecodeMethod",
    "Delta",
    "Dense",
    "DenseDecode",
    "LowRank",
    "Method",
    "OracleTopK",
    "PooledTopK",
    "PooledTopP",
    "QueryCentres",
    "Quest",
    "Recycled",
    "SALE",
    "SpargeAttn",
    "Squeezed",
    "Threshold",
    "ThresholdDecode",
    "TidalDecode",
    "TokenSelect",
    "TriAttention",
    "XAttention",
    "antidiagonal_mass",
    "block_mass",
    "query_centres",
    "self_similarity",
]
