"""Boxes of named global tensors: the one description of a shard.

Fused, padded and flattened storage is a list of pieces, each a box of a global tensor at a place in a flat
buffer; initialisation, norms, proofs and checkpoints read that list and need to know nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum


class Fill(StrEnum):
    """What a parameter holds before training."""

    NORMAL = "normal"
    ZEROS = "zeros"
    ONES = "ones"


@dataclass(frozen=True)
class GlobalTensor:
    """A tensor of the model as one device would hold it: its name, its whole shape, how it starts."""

    name: str
    shape: tuple[int, ...]
    fill: Fill = Fill.NORMAL
    std: float = 0.02

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Box:
    """A rectangular part of a global tensor: offsets and sizes, one per dimension."""

    tensor: GlobalTensor = field(repr=False)
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @staticmethod
    def whole(tensor: GlobalTensor) -> Box:
        """The box that covers all of a tensor."""
        return Box(tensor, (0,) * len(tensor.shape), tensor.shape)

    @property
    def name(self) -> str:
        """The global tensor's name."""
        return self.tensor.name

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return math.prod(self.size)

    def slices(self) -> tuple[slice, ...]:
        """Indexes the box within its whole tensor."""
        return tuple(slice(o, o + s) for o, s in zip(self.offset, self.size, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common part of two boxes of one tensor, or None where they do not meet."""
        if self.name != other.name:
            return None
        low = tuple(map(max, self.offset, other.offset))
        ends = (tuple(map(sum, zip(box.offset, box.size, strict=True))) for box in (self, other))
        high = tuple(map(min, *ends))
        if any(h <= o for o, h in zip(low, high, strict=True)):
            return None
        return Box(self.tensor, low, tuple(h - o for o, h in zip(low, high, strict=True)))

    def __str__(self) -> str:
        ranges = ", ".join(f"{o}:{o + s}" for o, s in zip(self.offset, self.size, strict=True))
        return f"{self.name}[{ranges}]"


@dataclass(frozen=True)
class Piece:
    """A box whose elements lie contiguously, in row-major order, from `start` of a flat buffer.

    `counts` is false where another rank along a model axis holds the same elements and counts them: every element
    counts once in norms and is written once to checkpoints.
    """

    box: Box
    start: int
    counts: bool = True

    @property
    def stop(self) -> int:
        """One past the last element in the flat buffer."""
        return self.start + self.box.numel


def flat_range(size: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, size) of the boxes that cover elements begin..end of a row-major array, in order.

    At most 2 * dimensions - 1 of them: three for a matrix (a partial row, whole rows, a partial row).
    """
    if begin >= end:
        return
    if len(size) <= 1:
        yield ((begin,), (end - begin,)) if size else ((), ())
        return
    inner = math.prod(size[1:])
    first, last = begin // inner, (end - 1) // inner
    if first == last:
        for offset, part in flat_range(size[1:], begin - first * inner, end - first * inner):
            yield (first, *offset), (1, *part)
        return
    head = begin - first * inner
    if head:
        for offset, part in flat_range(size[1:], head, inner):
            yield (first, *offset), (1, *part)
        first += 1
    tail = end - last * inner
    whole_rows = last + 1 if tail == inner else last
    if whole_rows > first:
        yield (first, *(0,) * (len(size) - 1)), (whole_rows - first, *size[1:])
    if tail != inner:
        for offset, part in flat_range(size[1:], 0, tail):
            yield (last, *offset), (1, *part)


def cut(pieces: list[Piece], begin: int, end: int) -> list[Piece]:
    """The pieces that cover begin..end of a flat buffer, their starts counted from `begin`."""
    result = []
    for piece in pieces:
        low, high = max(begin, piece.start), min(end, piece.stop)
        start = low - begin
        for offset, size in flat_range(piece.box.size, low - piece.start, high - piece.start):
            absolute = tuple(map(sum, zip(piece.box.offset, offset, strict=True)))
            part = Piece(Box(piece.box.tensor, absolute, size), start, piece.counts)
            result.append(part)
            start = part.stop
    return result
