"""The few verbs: each names its tensor, its axis and its reason, is counted, and returns a handle.

Note: direct exchange. gloo's all-gather and reduce-scatter cost two to three times what the same bytes cost as
messages from rank to rank (measured in docs/performance.md), so on CPUs these two verbs post sends and receives
between all pairs. The bytes are those of the ring, every rank is at work at once, and the owner sums in the order of
the ranks, so that results do not depend on timing. Sends are posted first: the other side answers a receive with its
message, and gloo's thread would then spin for the lock under which this rank still sends. Over NCCL the verbs are its
own, in place. An axis says which (`Transport`); tensors of GPUs over gloo take the direct way through host memory (see
staged.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shardwright.comm.mesh import Axis, Transport
from shardwright.comm.staged import fetch, fetched, host_like, put_back
from shardwright.comm.whereabouts import Call


class Handle(Protocol):
    """A transfer under way. `wait` returns when its result may be read, and its input written."""

    def wait(self) -> None:
        """Finish the transfer."""
        ...


class _Done:
    def wait(self) -> None:
        pass


DONE: Handle = _Done()
"""The handle of what has nothing to wait for."""


class _Pending:
    def __init__(self, call: Call, works: list[dist.Work], finish: Callable[[], object] | None = None) -> None:
        self._call, self._works, self._finish = call, works, finish
        call.posted()

    def wait(self) -> None:
        if self._works:
            self._call.wait(self._works)
        if self._finish is not None:
            self._finish()
        self._works, self._finish = [], None

    def __del__(self) -> None:
        # Dropped while under way, a receive would be withdrawn, and its message taken by the next one of the group.
        if self._works and dist.is_initialized():
            self.wait()


class Staged:
    """A transfer between host copies. `wait` brings what has arrived back to (tensor, host) pairs, on the current
    stream; `sent` is memory that must outlive the transfer."""

    def __init__(self, handle: Handle, back: Sequence[tuple[Tensor, Tensor]], sent: Tensor | None = None) -> None:
        self._handle, self._back, self._sent = handle, back, sent

    def wait(self) -> None:
        """See `Handle`."""
        self._handle.wait()
        put_back(self._back)
        self._handle, self._back, self._sent = DONE, (), None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def share(tensor: Tensor, axis: Axis, index: int) -> Tensor:
    """The part of a flat tensor that belongs to one position of an axis; the degree must divide its length."""
    length = tensor.numel() // axis.degree
    return tensor[index * length : (index + 1) * length]


def _posted(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is not in the group"
    return work


def pending(call: Call, *works: dist.Work | None) -> Handle:
    """The handle of transfers that torch has under way."""
    return _Pending(call, [_posted(work) for work in works])


def _others(axis: Axis) -> list[int]:
    """Positions of the other ranks, starting after this one, so that no rank is everybody's first target."""
    return [(axis.index + step) % axis.degree for step in range(1, axis.degree)]


def all_reduce(tensor: Tensor, axis: Axis, *, reason: str) -> Handle:
    """Sum a tensor over an axis, in place; every rank gets bitwise the same result."""
    if axis.group is None:
        return DONE
    call = axis.ledger.count("all_reduce", axis.name, reason, 2 * (axis.degree - 1) * _bytes(tensor) // axis.degree)
    if axis.transport is Transport.STAGED:
        host = fetched(tensor)
        return Staged(_sum(host, axis, call), [(tensor, host)])
    return _sum(tensor, axis, call)


def sums_in_place(axis: Axis) -> bool:
    """Whether an all-reduce makes no buffer for what arrives, as NCCL's does not, nor gloo's among more than two."""
    return axis.transport is Transport.NATIVE or axis.degree != 2


def _sum(tensor: Tensor, axis: Axis, call: Call) -> Handle:
    if not sums_in_place(axis):
        return _swap_and_add(tensor, axis, call)
    return pending(call, dist.all_reduce(tensor, group=axis.group, async_op=True))


def _swap_and_add(tensor: Tensor, axis: Axis, call: Call) -> Handle:
    """Between two ranks an all-reduce is one exchange: as many bytes as the ring's two halves, in one step."""
    received, other = axis.ledger.buffer(torch.empty_like(tensor)), axis.ranks[1 - axis.index]
    works = [_posted(dist.isend(tensor, other, group=axis.group))]
    works.append(_posted(dist.irecv(received, other, group=axis.group)))
    return _Pending(call, works, lambda: tensor.add_(received))  # a + b is b + a to the bit: both ranks get the same


def all_gather(whole: Tensor, axis: Axis, *, reason: str) -> Handle:
    """Fill a flat tensor with every rank's share of it; each rank has its own in place."""
    if axis.group is None:
        return DONE
    mine = share(whole, axis, axis.index)
    call = axis.ledger.count("all_gather", axis.name, reason, (axis.degree - 1) * _bytes(mine))
    if axis.transport is Transport.NATIVE:
        return pending(call, dist.all_gather_into_tensor(whole, mine, group=axis.group, async_op=True))
    if axis.transport is Transport.STAGED:
        host = host_like(whole)
        fetch(mine, share(host, axis, axis.index))
        back = [(share(whole, axis, other), share(host, axis, other)) for other in _others(axis)]
        return Staged(_gather_directly(host, axis, call), back, host)
    return _gather_directly(whole, axis, call)


def _gather_directly(whole: Tensor, axis: Axis, call: Call) -> Handle:
    mine, works = share(whole, axis, axis.index), []
    for other in _others(axis):
        works.append(_posted(dist.isend(mine, axis.ranks[other], group=axis.group)))
        works.append(_posted(dist.irecv(share(whole, axis, other), axis.ranks[other], group=axis.group)))
    return _Pending(call, works)


def reduce_scatter(whole: Tensor, axis: Axis, *, reason: str) -> Handle:
    """Sum a flat tensor over an axis, leaving in each rank's share of it the sum of that share.

    The other shares keep their local values over gloo and are undefined over NCCL.
    """
    if axis.group is None:
        return DONE
    mine = share(whole, axis, axis.index)
    call = axis.ledger.count("reduce_scatter", axis.name, reason, (axis.degree - 1) * _bytes(mine))
    if axis.transport is Transport.NATIVE:
        return pending(call, dist.reduce_scatter_tensor(mine, whole, group=axis.group, async_op=True))
    if axis.transport is Transport.STAGED:
        host = fetched(whole)
        return Staged(_scatter_directly(host, axis, call), [(mine, share(host, axis, axis.index))], host)
    return _scatter_directly(whole, axis, call)


def _scatter_directly(whole: Tensor, axis: Axis, call: Call) -> Handle:
    mine = share(whole, axis, axis.index)
    received = {other: axis.ledger.buffer(torch.empty_like(mine)) for other in _others(axis)}
    works = []
    for other, buffer in received.items():
        works.append(_posted(dist.isend(share(whole, axis, other), axis.ranks[other], group=axis.group)))
        works.append(_posted(dist.irecv(buffer, axis.ranks[other], group=axis.group)))

    def add() -> None:
        for other in sorted(received):
            mine.add_(received[other])

    return _Pending(call, works, add)


def broadcast(tensor: Tensor, axis: Axis, source: int, *, reason: str) -> Handle:
    """Give every rank of an axis the tensor of the one at a position; over gloo a tensor in host memory."""
    if axis.group is None:
        return DONE
    sends = _bytes(tensor) if axis.index == source else 0
    call = axis.ledger.count("broadcast", axis.name, reason, sends)
    return pending(call, dist.broadcast(tensor, axis.ranks[source], group=axis.group, async_op=True))


def barrier(axis: Axis, *, reason: str = "agreement") -> None:
    """Wait until every rank of an axis is here."""
    if axis.group is not None:
        call = axis.ledger.call("barrier", axis.name, reason)
        pending(call, dist.barrier(group=axis.group, async_op=True)).wait()


def broadcast_text(
    text: str | None, axis: Axis, device: torch.device, *, source: int = 0, reason: str = "agreement"
) -> str:
    """The text of the rank at one position of an axis, on every rank; what the others pass is not used."""
    if axis.group is None:
        assert text is not None
        return text
    content = (text or "").encode() if axis.index == source else b""
    device = device if axis.transport is Transport.NATIVE else torch.device("cpu")
    length = torch.tensor(len(content), device=device)
    call = axis.ledger.call("broadcast", axis.name, reason)
    pending(call, dist.broadcast(length, axis.ranks[source], group=axis.group, async_op=True)).wait()
    buffer = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if axis.index == source:
        buffer.copy_(torch.tensor(list(content), dtype=torch.uint8))
    pending(call, dist.broadcast(buffer, axis.ranks[source], group=axis.group, async_op=True)).wait()
    return bytes(buffer.cpu().tolist()).decode()
