"""A rank of one row of a comparison: some steps of the recipe under one technique, and a proof of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from shardwright.comm.collectives import barrier
from shardwright.comm.mesh import Mesh
from shardwright.comm.worker import Worker
from shardwright.optim.optimizers import make_optimizer
from shardwright.optim.schedule import learning_rate
from shardwright.parallel.compose import compose
from shardwright.plan.communication import estimated_communication
from shardwright.plan.memory import estimated_memory
from shardwright.plan.plan import Plan
from shardwright.record.store import read_json, write_json
from shardwright.train.batches import rank_batch
from shardwright.train.ledger import StepMemory
from shardwright.train.prepare import open_data
from shardwright.train.start import initial_values
from shardwright.train.step import train_step
from shardwright.train.timeline import StepTimeline
from shardwright.verify.trace import trace_layout, write_trace


def main(worker: Worker, arguments: tuple[str, ...]) -> None:
    """`arguments`: the row's folder, the steps to time, the steps to prove. The folder has a plan.json, and a proof/
    with that of the proof."""
    folder, timed, proven = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    plan = Plan.model_validate(read_json(folder / "plan.json"))
    mesh = worker.mesh(plan.topology)
    write_json(folder / f"{mesh.rank}.json", measured(plan, mesh, timed))
    proof = Plan.model_validate(read_json(folder / "proof" / "plan.json"))
    mesh.whereabouts.begin("proof")
    write_trace(folder / "proof", mesh.rank, trace_layout(proof, worker.mesh(proof.topology), proven))


def measured(plan: Plan, mesh: Mesh, timed: int) -> dict[str, Any]:
    """What a rank tells of a step that is watched by its memory, one by its time and its bytes, and `timed` others."""
    dataset = open_data(plan.spec, plan.architecture.vocab)
    runtime = compose(plan, mesh, values=initial_values(plan, mesh))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    losses: list[float] = []

    def step() -> None:
        index = len(losses)
        batch = rank_batch(runtime, dataset.train, index)
        losses.append(train_step(runtime, optimizer, batch, learning_rate(plan.spec.train, index)).loss)

    with StepMemory(runtime, optimizer) as memory:
        step()
    step()  # the first without a watcher
    seconds = []
    for _ in range(timed):
        barrier(mesh.world)
        began = time.perf_counter()
        step()
        barrier(mesh.world)
        seconds.append(time.perf_counter() - began)
    mesh.whereabouts.begin("timeline")
    with StepTimeline(mesh, len(losses) + 1) as timeline:
        mesh.ledger.clear()
        step()
        sent = mesh.ledger.as_records()
    runtime.states.finish()
    assert memory.record is not None and timeline.record is not None
    return {
        "rank": mesh.rank,
        "memory": {
            "estimated": estimated_memory(plan, mesh.rank).as_json(),
            "measured": memory.record.as_json(),
        },
        "communication": {
            "measured": sent,
            "estimated": [record.as_row() for record in estimated_communication(plan, mesh.rank)],
        },
        "seconds": seconds,
        "losses": losses,
        "timeline": timeline.record.as_json(),
    }
