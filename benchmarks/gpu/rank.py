"""A rank of the `ranks` section: the plans of one world take turns, and rank 0 writes what a step took."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from benchmarks.gpu.scale import LR, samples_of
from shardwright.comm.collectives import barrier
from shardwright.comm.mesh import Groups, Mesh
from shardwright.comm.worker import Worker
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import compose
from shardwright.plan.plan import Plan
from shardwright.record.store import read_json, write_json
from shardwright.train.batches import rank_batch
from shardwright.train.step import train_step


def main(worker: Worker, arguments: tuple[str, ...]) -> None:
    """`arguments` are the rounds, the steps of each, and folders that hold a plan.json each."""
    rounds, steps, folders = int(arguments[0]), int(arguments[1]), [Path(path) for path in arguments[2:]]
    groups, runs = Groups(), []
    for folder in folders:
        plan = Plan.model_validate(read_json(folder / "plan.json"))
        runtime = compose(plan, Mesh(plan.topology, worker.device, groups=groups))
        optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
        runs.append((folder, runtime, optimizer, samples_of(plan)))
    seconds: dict[Path, list[float]] = {folder: [] for folder in folders}
    losses: dict[Path, list[float]] = {folder: [] for folder in folders}
    for turn in range(rounds + 1):  # the first warms up
        for folder, runtime, optimizer, samples in runs:
            barrier(runtime.mesh.world)
            began = time.perf_counter()
            for index in range(turn * steps, (turn + 1) * steps):
                batch = rank_batch(runtime, samples, index)
                losses[folder].append(train_step(runtime, optimizer, batch, LR).loss)
            if worker.device.type == "cuda":
                torch.cuda.synchronize(worker.device)
            barrier(runtime.mesh.world)
            if turn:
                seconds[folder].append((time.perf_counter() - began) / steps)
    for folder, runtime, _, _ in runs:
        sent = sum(int(row["sent_bytes"]) for row in runtime.mesh.ledger.as_records()) // ((rounds + 1) * steps)
        row = {"seconds": seconds[folder], "losses": losses[folder], "sent_bytes": sent}
        if worker.rank == 0:
            write_json(folder / "speed.json", row)
