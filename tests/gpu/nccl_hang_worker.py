"""Programs for two NCCL ranks of test_hang_nccl.py, and a launcher: `nccl_hang_worker.py PROGRAM`."""

from __future__ import annotations

import os
import sys
import time

import torch

from shardwright.comm import worker as worker_module
from shardwright.comm.collectives import all_reduce, barrier
from shardwright.comm.job import Job
from shardwright.comm.launch import run
from shardwright.comm.watch import Watch
from shardwright.comm.worker import Worker
from shardwright.layout.mesh import Topology
from shardwright.units import Seconds

TIMEOUT = Seconds(5)

if os.environ.get("ONLY_WATCHDOG"):  # our own watch looks and does not act: NCCL's watchdog ends the process
    worker_module.MARGIN = Seconds(0)
    worker_module.Watch = lambda whereabouts, limit, overdue: Watch(whereabouts, limit, list)  # type: ignore


def main(worker: Worker, arguments: tuple[str, ...]) -> None:
    PROGRAMS[arguments[0]](worker)


def absent(worker: Worker) -> None:
    """Rank 1 does not come to the second sum; rank 0's host runs on to where it reads a value."""
    mesh = worker.mesh(Topology(shard=2))
    total = torch.ones(1, device=worker.device)
    mesh.whereabouts.begin("F stage 0 microbatch 0")
    all_reduce(total, mesh.shard, reason="zero/first").wait()
    mesh.whereabouts.begin("F stage 0 microbatch 1")
    if worker.rank == 1:
        time.sleep(600)
    all_reduce(total, mesh.shard, reason="zero/second").wait()
    mesh.whereabouts.begin("update")
    total.tolist()


def busy(worker: Worker) -> None:
    """Collectives for longer than the timeout, and a pause of the same length, in which no rank hangs."""
    mesh = worker.mesh(Topology(shard=2))
    total, began, calls = torch.ones(1 << 20, device=worker.device), time.monotonic(), 0
    flag = torch.zeros(1, device=worker.device)
    while flag.item() == 0:
        for _ in range(200):
            all_reduce(total, mesh.shard, reason="zero/norm").wait()
        calls += 200
        flag += time.monotonic() - began > 1.5 * TIMEOUT
        all_reduce(flag, mesh.shard, reason="health").wait()
    time.sleep(1.5 * TIMEOUT)
    barrier(mesh.world)
    if worker.rank == 0:
        print(f"{calls} sums")


def cost(worker: Worker) -> None:
    """What being seen adds to a wait on a GPU."""
    mesh = worker.mesh(Topology(shard=2))
    call = mesh.ledger.call("all_reduce", "shard", "zero/norm")
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(20_000):
            call.wait([])
        seconds = time.perf_counter() - began
        if worker.rank == 0:
            print(f"{seconds / 20_000 * 1e6:.2f} us for each wait")


PROGRAMS = {program.__name__: program for program in (absent, busy, cost)}

if __name__ == "__main__":
    arguments = (sys.argv[1],)
    sys.exit(run(Job(2, "nccl_hang_worker", arguments, device="cuda", collective_timeout=TIMEOUT)))
