"""Where a rank stands: the mesh's axes, their degrees and the coordinates of ranks. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

AXES = ("replicate", "pp", "shard", "tp")
DATA_AXES = ("replicate", "shard")


@dataclass(frozen=True)
class Coordinate:
    """A rank's position along each axis of the mesh."""

    replicate: int = 0
    pp: int = 0
    shard: int = 0
    tp: int = 0


@dataclass(frozen=True)
class Topology:
    """Degrees of the four axes and their order, outer to inner; ranks are numbered in that order.

    Every axis always exists; degree 1 is ordinary.
    """

    replicate: int = 1
    pp: int = 1
    shard: int = 1
    tp: int = 1
    order: tuple[str, ...] = AXES

    def __post_init__(self) -> None:
        if sorted(self.order) != sorted(AXES):
            raise ValueError(f"order {self.order} is not a permutation of {AXES}")
        if min(self.replicate, self.pp, self.shard, self.tp) < 1:
            raise ValueError(f"degrees must be at least 1: {self}")

    @property
    def world_size(self) -> int:
        """Ranks in the mesh: the product of the degrees."""
        return self.replicate * self.pp * self.shard * self.tp

    @property
    def dp(self) -> int:
        """Ranks that see different data: replicate x shard."""
        return self.replicate * self.shard

    def degree(self, *axes: str) -> int:
        """The product of the degrees of the named axes."""
        return math.prod(getattr(self, axis) for axis in axes)

    def coordinate(self, rank: int) -> Coordinate:
        """The position of a rank along each axis. Raises IndexError for a rank that is not in the mesh."""
        if not 0 <= rank < self.world_size:
            raise IndexError(f"rank {rank} of a mesh of {self.world_size}")
        position = {}
        for axis in reversed(self.order):
            rank, position[axis] = divmod(rank, getattr(self, axis))
        return Coordinate(**position)

    def stride(self, axis: str) -> int:
        """How far apart two ranks are that are neighbours along an axis."""
        return self.degree(*self.order[self.order.index(axis) + 1 :])

    def rank(self, coordinate: Coordinate) -> int:
        """The rank at a coordinate."""
        rank = 0
        for axis in self.order:
            rank = rank * getattr(self, axis) + getattr(coordinate, axis)
        return rank

    def data_index(self, rank: int) -> int:
        """Position of a rank among those that see different data: replicate outer, shard inner."""
        here = self.coordinate(rank)
        return here.replicate * self.shard + here.shard

    def group(self, axes: tuple[str, ...], rank: int) -> tuple[int, ...]:
        """Ranks that differ from `rank` along the named axes alone, ordered by those axes in AXES order."""
        here = self.coordinate(rank)
        named = [axis for axis in AXES if axis in axes]
        members = []
        for position in product(*(range(getattr(self, axis)) for axis in named)):
            members.append(self.rank(Coordinate(**(vars(here) | dict(zip(named, position, strict=True))))))
        return tuple(members)
