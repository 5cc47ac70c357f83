"""A rank of test_staged.py: all that it exchanges goes through copies in host memory, as tensors of GPUs do on gloo."""

from __future__ import annotations

from pathlib import Path

from shardwright.comm.mesh import Mesh, Transport
from shardwright.comm.worker import Worker
from shardwright.plan.plan import Plan
from shardwright.record.store import read_json
from shardwright.verify.trace import trace_layout, write_trace


def main(worker: Worker, arguments: tuple[str, ...]) -> None:
    folder = Path(arguments[0])
    plan = Plan.model_validate(read_json(folder / "plan.json"))
    mesh = Mesh(plan.topology, worker.device, transport=Transport.STAGED)
    write_trace(folder, mesh.rank, trace_layout(plan, mesh, 2))
