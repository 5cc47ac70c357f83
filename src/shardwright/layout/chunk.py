"""Cutting the update of an owned range into windows of bounded size.

A fused kernel computes groups of elements with vector instructions and what is left over at the end of its range one by
one, which may round differently. So a range that is updated in pieces is cut at multiples of GRAIN from the beginning
of each part alone: every piece then groups its elements as one call over the whole part would, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

GRAIN = 64
"""Elements: a multiple of every vector register's and cache line's number of them."""

UPDATE_ELEMENTS = 1 << 24
"""The most elements that are updated by one call on a GPU where nothing streams: bounds the gradient in the masters'
dtype."""

CACHED_ELEMENTS = 1 << 18
"""Of a CPU's thread: a window's gradient is cast and scaled, and its new values cast, while both are in the caches."""


@dataclass(frozen=True)
class Run:
    """Elements begin..end that one call of a kernel updates, all with weight decay or all without."""

    begin: int
    end: int
    decays: bool


@dataclass(frozen=True)
class Window:
    """Consecutive runs that are moved and updated together."""

    runs: tuple[Run, ...]

    @property
    def begin(self) -> int:
        """The first element."""
        return self.runs[0].begin

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.runs[-1].end


def windows(length: int, decayed: int, most: int) -> list[Window]:
    """Elements 0..length, of which the first `decayed` take weight decay, in windows of up to `most` >= GRAIN."""
    assert most >= GRAIN
    found: list[Window] = []
    runs: list[Run] = []
    room = most
    for part_begin, part_end, decays in ((0, decayed, True), (decayed, length, False)):
        begin = part_begin
        while begin < part_end:
            end = part_end if part_end - begin <= room else begin + room // GRAIN * GRAIN
            if begin < end:
                runs.append(Run(begin, end, decays))
                room -= end - begin
                begin = end
            if begin < part_end:
                found.append(Window(tuple(runs)))
                runs, room = [], most
    return [*found, Window(tuple(runs))] if runs else found


def slot_elements(limit: int, bytes_per_element: int, longest: int) -> int:
    """Elements of a buffer that windows stream through: at most `limit` bytes, and no more than the longest owned
    range needs. A multiple of GRAIN; 0 where the limit is too small."""
    return min(limit // bytes_per_element // GRAIN, -(-longest // GRAIN)) * GRAIN
