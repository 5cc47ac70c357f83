"""A rank of test_line.py: a pipeline over a channel for every directed link, as on NCCL, here made of gloo groups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shardwright.comm.line import channels_of
from shardwright.comm.mesh import Mesh
from shardwright.comm.worker import Worker
from shardwright.parallel.compose import compose
from shardwright.plan.plan import Plan
from shardwright.record.store import read_json
from shardwright.verify.trace import trace_layout, write_trace


def main(worker: Worker, arguments: tuple[str, ...]) -> None:
    for folder in map(Path, arguments):
        plan = Plan.model_validate(read_json(folder / "plan.json"))
        mesh = Mesh(plan.topology, worker.device)
        runtime = compose(plan, mesh)
        line = replace(runtime.pipeline.line, channels=channels_of(mesh))
        line.connect(worker.device)
        runtime.pipeline.line = line
        for unit in runtime.states.units:
            unit.twin = unit.twin and replace(unit.twin, line=line)
        write_trace(folder, mesh.rank, trace_layout(plan, mesh, 1, runtime))
        for (source, to), group in line.channels.items():
            assert group.size() == (1 if source == to else 2)
