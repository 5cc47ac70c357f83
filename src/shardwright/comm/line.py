"""From rank to rank along the pipeline: the verbs that have a sender and a receiver.

Note: one channel for each direction of each link. NCCL carries out the transfers of one group between two ranks in the
order in which each of them posted, so two ranks that each post a receive ahead of a send would wait for each other for
ever. Over NCCL every directed link of the ring therefore has a group of two ranks to itself; gloo matches each sender's
messages to the receives from it, in order, and one group serves all. `Groups` needs ranks that have made equally many
groups: links are made in rounds in which no rank has two, and a rank without one makes a group of itself. NCCL connects
two ranks when both have posted their first transfer, and holds the one that came first until then, which in a schedule
may wait for more than that: so every channel carries a first message when it is made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from shardwright.comm.collectives import Handle, Staged, pending
from shardwright.comm.mesh import Axis, Mesh, Transport
from shardwright.comm.staged import fetched, host_like
from shardwright.comm.whereabouts import Call


@dataclass(frozen=True)
class Line:
    """The `pp` axis as messages travel along it; `channels` are the groups of directed links (from, to)."""

    axis: Axis
    channels: Mapping[tuple[int, int], dist.ProcessGroup]

    @staticmethod
    def of(mesh: Mesh) -> Line:
        """The line of a mesh's rank."""
        if mesh.transport is not Transport.NATIVE:
            return Line(mesh.pp, {})
        # It warns of transfers that wait for others of their group: here a group has those of one link and direction.
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
        line = Line(mesh.pp, channels_of(mesh))
        line.connect(mesh.device)
        return line

    def connect(self, device: torch.device) -> None:
        """Send a first message over every channel of this rank."""
        for source, to in self.channels:
            if source != to:
                other = to if source == self.index else source
                transfer = send if source == self.index else receive
                transfer(torch.zeros(1, device=device), self, other, reason="pipeline/connect").wait()

    @property
    def index(self) -> int:
        """This rank's position."""
        return self.axis.index

    def channel(self, source: int, to: int) -> dist.ProcessGroup:
        """The group over which one position sends to another."""
        group = self.channels.get((source, to), self.axis.group)
        assert group is not None, "a line of one rank has nobody to talk to"
        return group


def channels_of(mesh: Mesh) -> dict[tuple[int, int], dist.ProcessGroup]:
    """A group for each directed link (from, to) of this rank, and groups of itself where it has none in a round."""
    axis, channels = mesh.pp, {}
    for number, links in enumerate(rounds(axis.degree)):
        own = next((link for link in links if axis.index in link), (axis.index, axis.index))
        ranks = tuple(axis.ranks[position] for position in sorted(set(own)))
        down, up = (mesh.groups.get(ranks, f"pipeline-{number}-{way}") for way in ("down", "up"))
        channels |= {own: down, own[::-1]: up}
    return channels


def rounds(degree: int) -> list[list[tuple[int, int]]]:
    """The ring's links in rounds in which each position has one at most."""
    links = [(i, (i + 1) % degree) for i in range(degree if degree > 2 else degree - 1)]
    colours = [2 if degree % 2 and i == degree - 1 else i % 2 for i in range(len(links))]
    return [[link for link, own in zip(links, colours, strict=True) if own == c] for c in sorted(set(colours))]


def send(tensor: Tensor, line: Line, to: int, *, reason: str) -> Handle:
    """Send a contiguous tensor to a position of the line; it may be written again after the handle's wait."""
    call = line.axis.ledger.count("send", line.axis.name, reason, tensor.numel() * tensor.element_size())
    if line.axis.transport is Transport.STAGED:
        host = fetched(tensor)
        return Staged(_sent(host, line, to, call), (), host)
    return _sent(tensor, line, to, call)


def _sent(tensor: Tensor, line: Line, to: int, call: Call) -> Handle:
    return pending(call, dist.isend(tensor, line.axis.ranks[to], group=line.channel(line.index, to)))


def receive(tensor: Tensor, line: Line, source: int, *, reason: str) -> Handle:
    """Fill a tensor with the next message from a position of the line."""
    call = line.axis.ledger.call("receive", line.axis.name, reason)
    if line.axis.transport is Transport.STAGED:
        host = host_like(tensor)
        return Staged(_received(host, line, source, call), [(tensor, host)])
    return _received(tensor, line, source, call)


def _received(tensor: Tensor, line: Line, source: int, call: Call) -> Handle:
    return pending(call, dist.irecv(tensor, line.axis.ranks[source], group=line.channel(source, line.index)))


def exchange_sum(tensor: Tensor, line: Line, other: int, *, reason: str) -> Handle:
    """Sum a tensor with another position's, in place on both, to the same bits: a + b is b + a."""
    received = tensor.new_empty(tensor.shape)
    handles = [send(tensor, line, other, reason=reason), receive(received, line, other, reason=reason)]
    return _Sum(tensor, received, handles)


class _Sum:
    def __init__(self, tensor: Tensor, received: Tensor, handles: list[Handle]) -> None:
        self._tensor, self._received, self._handles = tensor, received, handles

    def wait(self) -> None:
        for handle in self._handles:
            handle.wait()
        if self._handles:
            self._tensor.add_(self._received)
        self._handles = []
