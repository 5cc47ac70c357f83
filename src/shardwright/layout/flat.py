"""How the parameters of a unit lie in one flat buffer, and which contiguous range of it each owner has.

Matrices come first and the rest after, so that what takes weight decay is a prefix; parameters whose gradients are sums
of parts held along the `tp` axis stand together around that boundary. Every parameter starts at a multiple of
ALIGNMENT, and the length is padded so that it divides by the owners and by those who share the counting. Padding and
gaps hold zeros and belong to no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from shardwright.layout.box import Piece, cut

ALIGNMENT = 16
"""Elements: 64 bytes of fp32, 32 of bf16, so that vector loads and matrix products start aligned."""


@dataclass(frozen=True)
class Member:
    """A parameter of a unit: its shape and the boxes it holds. `partial`: its gradient here is one part of a sum."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    partial: bool = False

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Slot:
    """The place of the unit's member number `index`, from `start` of the buffer."""

    index: int
    member: Member
    start: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return self.member.shape

    @property
    def stop(self) -> int:
        """One past the parameter's last element."""
        return self.start + self.member.numel


@dataclass(frozen=True)
class FlatLayout:
    """The slots of a unit's parameters, in buffer order, and the buffer's padded length in elements."""

    slots: tuple[Slot, ...]
    length: int

    @staticmethod
    def of(members: Sequence[Member], divisor: int) -> FlatLayout:
        """Lay out a unit's parameters; `divisor` is the number of ranks that share the buffer."""

        def place(index: int) -> int:
            matrix, partial = len(members[index].shape) >= 2, members[index].partial
            return (1 if partial else 0) if matrix else (2 if partial else 3)

        slots: list[Slot] = []
        end = 0
        for index in sorted(range(len(members)), key=place):
            slots.append(Slot(index, members[index], -(-end // ALIGNMENT) * ALIGNMENT))
            end = slots[-1].stop
        block = ALIGNMENT * divisor
        return FlatLayout(tuple(slots), -(-end // block) * block)

    @property
    def numel(self) -> int:
        """Elements that belong to parameters."""
        return sum(piece.box.numel for piece in self.pieces)

    @property
    def padding(self) -> int:
        """Elements that belong to none."""
        return self.length - self.numel

    @cached_property
    def decayed(self) -> int:
        """The length of the prefix that takes weight decay: the matrices."""
        return max((slot.stop for slot in self.slots if len(slot.shape) >= 2), default=0)

    @cached_property
    def partial(self) -> tuple[int, int]:
        """(begin, end) of the range whose gradients are sums of parts along the `tp` axis; empty where begin = end."""
        slots = [slot for slot in self.slots if slot.member.partial]
        return (slots[0].start, slots[-1].stop) if slots else (0, 0)

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Ranges (begin, end) that belong to no tensor."""
        edges = [0, *(edge for piece in self.pieces for edge in (piece.start, piece.stop)), self.length]
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return tuple((begin, end) for begin, end in pairs if begin < end)

    @cached_property
    def counted(self) -> tuple[tuple[int, int], ...]:
        """Ranges (begin, end) that count in norms: all but what another rank along a model axis counts."""
        if all(piece.counts for piece in self.pieces):
            return ((0, self.length),)
        return tuple((piece.start, piece.stop) for piece in self.pieces if piece.counts)

    @cached_property
    def pieces(self) -> list[Piece]:
        """The boxes of global tensors that the buffer holds, in buffer order."""
        return [
            Piece(piece.box, slot.start + piece.start, piece.counts)
            for slot in self.slots
            for piece in slot.member.pieces
        ]

    def owned_range(self, degree: int, index: int) -> tuple[int, int]:
        """(begin, end) of the range of owner `index` of `degree`."""
        share = self.length // degree
        return index * share, (index + 1) * share

    def owned_pieces(self, degree: int, index: int) -> list[Piece]:
        """The boxes of an owner's range, their starts counted from its beginning."""
        return cut(self.pieces, *self.owned_range(degree, index))
