"""Programs for the ranks of test_hang.py, and a launcher: `hang_worker.py '{job fields}' PROGRAM`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time

import torch
from pool import TINY

from shardwright.comm.collectives import all_reduce, barrier
from shardwright.comm.job import Job
from shardwright.comm.launch import run
from shardwright.comm.line import Line, receive
from shardwright.comm.worker import Worker
from shardwright.layout.mesh import Topology
from shardwright.parallel.compose import compose
from shardwright.plan.resolve import resolve
from shardwright.spec.load import build


def main(worker: Worker, arguments: tuple[str, ...]) -> None:
    limit = threading.Timer(60, os._exit, [9])  # where nothing ends the ranks, the test fails
    limit.daemon = True
    limit.start()
    PROGRAMS[arguments[0]](worker)


def hook(worker: Worker) -> None:
    """The second rank of a pipeline sleeps in its stage's forward of microbatch 1."""
    recipe = {
        "model": TINY,
        "train": {"steps": 1, "sequence_length": 5, "global_batch_size": 4, "micro_batch_size": 2, "dtype": "fp64"},
        "parallel": {"dp": 1, "pp": 2},
    }
    plan = resolve(build(recipe), world_size=2, device="cpu", native_bf16=True, tokenizer_vocab=None)
    mesh = worker.mesh(plan.topology)
    runtime = compose(plan, mesh)
    stage = runtime.pipeline.stages.get(1)
    forwards = []

    def sleep(*_: object) -> None:
        forwards.append(0)
        if len(forwards) == 2:
            time.sleep(600)

    if stage is not None:
        stage.blocks[0].register_forward_hook(sleep)
    tokens = torch.zeros(2, plan.sequence_length, dtype=torch.long)
    runtime.pipeline.run([(tokens, tokens)] * 2, torch.ones((), dtype=torch.float64))


def absent(worker: Worker) -> None:
    """The last rank does not come to the others' sum."""
    mesh = worker.mesh(Topology(shard=worker.world_size))
    barrier(mesh.world)
    mesh.whereabouts.begin("update")
    if worker.rank == worker.world_size - 1:
        time.sleep(600)
    all_reduce(torch.ones(1, device=worker.device), mesh.shard, reason="zero/norm").wait()
    barrier(mesh.world)  # where NCCL's host is held up


def both_receive(worker: Worker) -> None:
    """Each of two ranks waits for a message of the other."""
    line = Line.of(worker.mesh(Topology(pp=2)))
    other = 1 - worker.rank
    receive(torch.ones(1, device=worker.device), line, other, reason=f"test/from-{other}").wait()


def aborts(worker: Worker) -> None:
    """Rank 0 ends as one that NCCL's watchdog ends: after the timeout, in a collective, with SIGABRT."""
    if worker.rank == 0:
        worker.whereabouts.enter(b"all_gather along shard for zero/gather")
        time.sleep(float(os.environ["ABORT_AFTER"]))
        os.abort()
    time.sleep(600)


PROGRAMS = {program.__name__: program for program in (hook, absent, both_receive, aborts)}

if __name__ == "__main__":
    fields, program = sys.argv[1:]
    sys.exit(run(Job(entry="hang_worker", arguments=(program,), **json.loads(fields))))
