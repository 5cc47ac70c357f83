"""Data parallelism: who reduces gradients with whom.

Ranks along the data axes see different sequences. A gradient is summed over both: scattered over the owners first (the
`shard` axis, under ZeRO), then summed over the copies of each share. Without ZeRO nobody owns less than everything,
and all data ranks are copies: the same rule with one owner.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardwright.comm.line import Line
from shardwright.comm.mesh import Axis, Mesh


@dataclass(frozen=True)
class DataParallel:
    """`owners` share one copy of the state; `copies` hold the same share of it.

    `partials` is the axis along which ranks hold parts of the gradient of a parameter that each of them has.
    """

    owners: Axis
    copies: Axis
    partials: Axis

    @staticmethod
    def of(mesh: Mesh, owns_state: bool) -> DataParallel:
        """The two axes of a mesh, for state that is owned in shares or by every rank alike."""
        owners, copies = (mesh.shard, mesh.replicate) if owns_state else (mesh.axis(), mesh.data)
        return DataParallel(owners, copies, mesh.tp)

    @property
    def degree(self) -> int:
        """Ranks that see different data."""
        return self.owners.degree * self.copies.degree


@dataclass(frozen=True)
class Twin:
    """A parameter that two stages of a pipeline use lives on the ranks of both, and `other` is the other's position.

    Both hold the same share of it, sum its gradient, and so make the same update twice. `order` is the parameter's
    place in the model: two ranks may share several, and exchange them in that order.
    """

    line: Line
    other: int
    order: int
