"""A rank of a proof: it traces each plan in turn and writes what it owns."""

from __future__ import annotations

from pathlib import Path

from shardwright.comm.worker import Worker
from shardwright.plan.plan import Plan
from shardwright.record.store import read_json
from shardwright.verify.trace import trace_layout, write_trace


def main(worker: Worker, arguments: tuple[str, ...]) -> None:
    """`arguments` are the number of steps, then folders that hold a plan.json each."""
    steps = int(arguments[0])
    for folder in map(Path, arguments[1:]):
        plan = Plan.model_validate(read_json(folder / "plan.json"))
        mesh = worker.mesh(plan.topology)
        write_trace(folder, mesh.rank, trace_layout(plan, mesh, steps))
