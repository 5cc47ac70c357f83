"""A rank of test_engine.py: verbs on tensors of a shared GPU, under kernels that are still running."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from shardwright.comm.collectives import all_gather, all_reduce, barrier, broadcast_text, reduce_scatter, share
from shardwright.comm.line import Line, exchange_sum, receive, send
from shardwright.comm.mesh import Axis, Mesh, Transport
from shardwright.comm.worker import Worker
from shardwright.layout.mesh import Topology
from shardwright.record.store import write_json

LENGTH = 1 << 22


def late(value: float, device: torch.device) -> Tensor:
    """A tensor that a long queue of kernels has still to write when this returns."""
    tensor = torch.zeros(LENGTH, device=device)
    for _ in range(200):
        tensor += value / 200
    return tensor.fill_(value)


def collectives(axis: Axis, device: torch.device) -> dict[str, bool]:
    total = float(sum(range(1, axis.degree + 1)))
    reduced, scattered, whole = (late(axis.index + 1.0, device) for _ in range(3))
    handles = [
        all_reduce(reduced, axis, reason="test"),
        reduce_scatter(scattered, axis, reason="test"),
        all_gather(whole, axis, reason="test"),
    ]
    for handle in handles:
        handle.wait()
    mine = share(scattered, axis, axis.index)
    shares = [share(whole, axis, i) for i in range(axis.degree)]
    return {
        "all_reduce": bool((reduced == total).all()),
        "reduce_scatter": bool((mine == total).all()),
        "all_gather": all(bool((part == i + 1.0).all()) for i, part in enumerate(shares)),
    }


def along(line: Line, device: torch.device) -> dict[str, bool]:
    other = 1 - line.index
    received = torch.zeros(LENGTH, device=device)
    handles = [
        receive(received, line, other, reason="test"),
        send(late(line.index + 1.0, device), line, other, reason="test"),
    ]
    for handle in handles:
        handle.wait()
    total = late(line.index + 1.0, device)
    exchange_sum(total, line, other, reason="test").wait()
    return {"receive": bool((received == other + 1.0).all()), "exchange_sum": bool((total == 3.0).all())}


def main(worker: Worker, arguments: tuple[str, ...]) -> None:
    mesh = Mesh(Topology(shard=4), worker.device)
    pairs = Mesh(Topology(shard=2, pp=2), worker.device)
    found = {"staged": mesh.transport is Transport.STAGED, "cuda": worker.device.type == "cuda"}
    found |= collectives(mesh.shard, worker.device)
    found |= {f"two: {name}": right for name, right in collectives(pairs.shard, worker.device).items()}
    found |= along(Line.of(pairs), worker.device)
    with torch.cuda.stream(torch.cuda.Stream(worker.device)):
        found |= {f"stream: {name}": right for name, right in collectives(mesh.shard, worker.device).items()}
    text = broadcast_text("text" if mesh.rank == 0 else None, mesh.world, worker.device)
    found["broadcast_text"] = text == "text"
    barrier(mesh.world)
    write_json(Path(arguments[0]) / f"{worker.rank}.json", found)
