"""Bytes of the cache of keys and values that generation keeps, in closed form."""

from __future__ import annotations

from shardwright.cost.memory import BYTES
from shardwright.layout.split import kv_heads_for
from shardwright.spec.architecture import Architecture
from shardwright.units import Bytes


def cache_bytes(
    a: Architecture, *, tp: int, index: int, layers: int, sequences: int, positions: int, dtype: str
) -> Bytes:
    """Of a rank at `index` of the `tp` axis with so many layers: 2 x layers x its key-value heads x head_dim for each
    position of each sequence."""
    first, last = kv_heads_for(a.heads, a.kv_heads, tp, index)
    return Bytes(2 * layers * (last - first) * a.head_dim * positions * sequences * BYTES[dtype])
