"""The mesh as a rank meets it: its coordinate, and one axis object per direction to communicate along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

import torch
import torch.distributed as dist

from shardwright.comm.ledger import CommunicationLedger
from shardwright.comm.whereabouts import Whereabouts
from shardwright.layout.mesh import DATA_AXES, Coordinate, Topology


class Transport(StrEnum):
    """How tensors travel between the ranks of an axis."""

    NATIVE = "native"
    """By the backend's own collectives, in place: NCCL."""
    DIRECT = "direct"
    """As messages from rank to rank: gloo, CPU tensors."""
    STAGED = "staged"
    """The same, from and to copies in host memory: gloo, tensors of GPUs."""

    @staticmethod
    def of(device: torch.device) -> Transport:
        """What fits a device and the backend of this process's world."""
        if device.type == "cpu":
            # gloo moves CPU tensors between two ranks much faster than its own gather and scatter do.
            return Transport.DIRECT
        gloo = dist.is_initialized() and dist.get_backend() == "gloo"
        return Transport.STAGED if gloo else Transport.NATIVE


@dataclass(frozen=True)
class Axis:
    """Ranks that differ along one direction of the mesh, and this rank's place among them.

    `group` is None where the degree is 1: there is nobody to talk to, and every verb is the identity.
    """

    name: str
    ranks: tuple[int, ...]
    index: int
    group: dist.ProcessGroup | None
    ledger: CommunicationLedger
    transport: Transport

    @property
    def degree(self) -> int:
        """How many ranks."""
        return len(self.ranks)


class Groups:
    """Process groups by their ranks, made once each.

    Every rank must ask for the groups that it is in, in the same order as its fellow members. Members of a gloo group
    must have made equally many before (torch 2.13 numbers them by a counter in each process, and hangs otherwise), as
    they have where meshes cover the whole world and each rank is in one group of every axis. `when_made` follows each.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self._timeout = timeout
        self.when_made: Callable[[], None] = lambda: None
        self._made: dict[tuple[tuple[int, ...], str], dist.ProcessGroup] = {}

    def get(self, ranks: tuple[int, ...], purpose: str = "") -> dist.ProcessGroup:
        """The group of these global ranks, in this order; one for each purpose."""
        if (ranks, purpose) not in self._made:
            # Local synchronisation: only members take part, so the cost does not grow with the world.
            group = dist.new_group(list(ranks), timeout=self._timeout, use_local_synchronization=True)
            assert isinstance(group, dist.ProcessGroup)
            self._made[ranks, purpose] = group
            self.when_made()
        return self._made[ranks, purpose]


class Mesh:
    """A topology laid over some ranks of the job, seen from this rank.

    `ranks` maps the topology's numbering to the job's; by default they are the same. `transport` is by default what
    fits the device and the world. The rank is seen in its collectives by its `whereabouts`. Two meshes can live in one
    process: nothing here is global.
    """

    def __init__(
        self,
        topology: Topology,
        device: torch.device,
        *,
        groups: Groups | None = None,
        ranks: Sequence[int] | None = None,
        rank: int | None = None,
        transport: Transport | None = None,
        whereabouts: Whereabouts | None = None,
    ) -> None:
        self.topology = topology
        self.device = device
        self.whereabouts = Whereabouts() if whereabouts is None else whereabouts
        self.ledger = CommunicationLedger(whereabouts=self.whereabouts)
        self.groups = groups if groups is not None else Groups()
        self._ranks = tuple(ranks) if ranks is not None else tuple(range(topology.world_size))
        if rank is None:
            rank = dist.get_rank() if topology.world_size > 1 else self._ranks[0]
        self.rank = self._ranks.index(rank)
        self.coordinate: Coordinate = topology.coordinate(self.rank)
        self.transport = Transport.of(device) if transport is None else transport
        self.replicate = self.axis("replicate")
        self.shard = self.axis("shard")
        self.tp = self.axis("tp")
        self.pp = self.axis("pp")
        self.data = self.axis(*DATA_AXES)
        self.world = self.axis(*topology.order)

    def axis(self, *names: str) -> Axis:
        """The ranks that differ from this one along the named axes, as one axis."""
        members = self.topology.group(names, self.rank)
        group = self.groups.get(tuple(self._ranks[m] for m in members)) if len(members) > 1 else None
        title = "world" if len(names) == len(self.topology.order) else "x".join(names) or "none"
        ranks = tuple(self._ranks[m] for m in members)
        return Axis(title, ranks, members.index(self.rank), group, self.ledger, self.transport)
