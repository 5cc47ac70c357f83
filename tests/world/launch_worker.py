"""Programs for the ranks of test_launch.py, and a launcher: `launch_worker.py '{job fields}' PROGRAM FOLDER`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from shardwright.comm.job import Job
from shardwright.comm.launch import run
from shardwright.comm.worker import Worker
from shardwright.errors import RunError


def main(worker: Worker, arguments: tuple[str, ...]) -> None:
    program, folder = arguments
    total = torch.ones(1)
    dist.all_reduce(total)
    draft = Path(folder) / f".{worker.rank}"
    draft.write_text(str(os.getpid()))
    draft.rename(Path(folder) / f"ready-{worker.rank}")
    PROGRAMS[program](worker, Path(folder), total.item())


def clean(worker: Worker, folder: Path, total: float) -> None:
    """Say what the world looks like, and wait until the test has looked at it."""
    say(f"rank {worker.rank} of {worker.world_size}: sum {total:.0f}, {torch.get_num_threads()} threads")
    while not (folder / "leave").exists():
        time.sleep(0.02)


def condition(worker: Worker, folder: Path, total: float) -> None:
    if worker.rank == 1:
        raise RunError("data.corpus: nothing there", "name another")
    dist.barrier()


def defect(worker: Worker, folder: Path, total: float) -> None:
    if worker.rank == 1:
        raise ValueError("a defect")
    dist.barrier()


def exits(worker: Worker, folder: Path, total: float) -> None:
    if worker.rank == 1:
        os._exit(3)
    dist.barrier()


def waits(worker: Worker, folder: Path, total: float) -> None:
    """Rank 0 waits inside a collective for the others, which never come."""
    if worker.rank == 0:
        dist.barrier()
    time.sleep(600)


def steps(worker: Worker, folder: Path, total: float) -> None:
    """A training loop: every step agrees across ranks whether one of them was asked to stop."""
    for step in range(10_000):
        flag = torch.tensor([float(worker.stop.requested is not None)])
        for _ in range(20):
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag.item():
            say(f"rank {worker.rank} left after its step")
            return
        if step == 3:
            (folder / f"steps-{worker.rank}").touch()
        time.sleep(0.01)


def fails_once(worker: Worker, folder: Path, total: float) -> None:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        defect(worker, folder, total)
    say(f"rank {worker.rank}: second attempt, sum {total:.0f}")


def say(line: str) -> None:
    """Print a line in one piece: ranks share the output."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


PROGRAMS = {program.__name__: program for program in (clean, condition, defect, exits, waits, steps, fails_once)}

if __name__ == "__main__":
    fields, *arguments = sys.argv[1:]
    sys.exit(run(Job(entry="launch_worker", arguments=tuple(arguments), **json.loads(fields))))
