"""How a dimension is cut over an axis: as evenly as it divides, whatever its length."""

from __future__ import annotations


def even_split(length: int, degree: int, index: int) -> tuple[int, int]:
    """(begin, end) of part `index` of `degree`: parts differ by one at most, none is empty if length >= degree."""
    return length * index // degree, length * (index + 1) // degree


def kv_heads_for(heads: int, kv_heads: int, degree: int, index: int) -> tuple[int, int]:
    """(begin, end) of the key-value heads that part `index` of the query heads uses; `degree` must divide `heads`."""
    per_kv = heads // kv_heads
    begin, end = even_split(heads, degree, index)
    return begin // per_kv, (end - 1) // per_kv + 1


def kv_head_of_each(heads: int, kv_heads: int, degree: int, index: int) -> list[int]:
    """For each query head of part `index`, the position of its key-value head among those that the part holds."""
    per_kv = heads // kv_heads
    begin, end = even_split(heads, degree, index)
    first = begin // per_kv
    return [head // per_kv - first for head in range(begin, end)]


def first_holder(heads: int, kv_heads: int, degree: int, kv_head: int) -> int:
    """The first part that holds a key-value head: it counts it."""
    per_kv = heads // kv_heads
    return kv_head * per_kv * degree // heads
