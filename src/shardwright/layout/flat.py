"""How the parameters of a unit lie in one flat buffer, and which contiguous range of it each owner has.

Matrices come first and the rest after, so that what takes weight decay is a prefix; every parameter starts at a
multiple of ALIGNMENT, and the length is padded so that it divides by the owners and by those who share the counting.
Padding and gaps hold zeros and belong to no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from shardwright.layout.box import Box, Piece, cut

ALIGNMENT = 16
"""Elements: 64 bytes of fp32, 32 of bf16, so that vector loads and matrix products start aligned."""


@dataclass(frozen=True)
class Slot:
    """One parameter's place: its shape and pieces, from `start` of the buffer."""

    index: int
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    start: int

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """One past the parameter's last element."""
        return self.start + self.numel


@dataclass(frozen=True)
class FlatLayout:
    """The slots of a unit's parameters, in buffer order, and the buffer's padded length in elements."""

    slots: tuple[Slot, ...]
    length: int

    @staticmethod
    def of(parameters: Sequence[tuple[tuple[int, ...], tuple[Piece, ...]]], divisor: int) -> FlatLayout:
        """Lay out parameters given as (shape, pieces); `divisor` is the number of ranks that share the buffer."""
        order = sorted(range(len(parameters)), key=lambda i: len(parameters[i][0]) < 2)
        slots, end = [], 0
        for index in order:
            shape, pieces = parameters[index]
            start = -(-end // ALIGNMENT) * ALIGNMENT
            slots.append(Slot(index, shape, pieces, start))
            end = slots[-1].stop
        block = ALIGNMENT * divisor
        return FlatLayout(tuple(slots), -(-end // block) * block)

    @property
    def numel(self) -> int:
        """Elements that belong to parameters."""
        return sum(slot.numel for slot in self.slots)

    @property
    def padding(self) -> int:
        """Elements that belong to none."""
        return self.length - self.numel

    @cached_property
    def decayed(self) -> int:
        """The length of the prefix that takes weight decay: the matrices."""
        return max((slot.stop for slot in self.slots if len(slot.shape) >= 2), default=0)

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Ranges (begin, end) that belong to no parameter."""
        edges = [0, *(edge for slot in self.slots for edge in (slot.start, slot.stop)), self.length]
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return tuple((begin, end) for begin, end in pairs if begin < end)

    @cached_property
    def pieces(self) -> list[Piece]:
        """The boxes of global tensors that the buffer holds, in buffer order."""
        return [Piece(piece.box, slot.start + piece.start) for slot in self.slots for piece in slot.pieces]

    def owned_range(self, degree: int, index: int) -> tuple[int, int]:
        """(begin, end) of the range of owner `index` of `degree`."""
        share = self.length // degree
        return index * share, (index + 1) * share

    def owned_pieces(self, degree: int, index: int) -> list[Piece]:
        """The boxes of an owner's range, their starts counted from its beginning."""
        return cut(self.pieces, *self.owned_range(degree, index))

    def find(self, offset: int) -> tuple[Box, int] | None:
        """The box that holds an element of the buffer and the element's place in it; None in padding."""
        for piece in self.pieces:
            if piece.start <= offset < piece.stop:
                return piece.box, offset - piece.start
        return None
