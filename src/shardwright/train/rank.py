"""A rank of a training run, from joining the world to the last record."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from shardwright.comm.collectives import barrier, broadcast_text
from shardwright.comm.memory import keep_freed_memory
from shardwright.comm.mesh import Mesh
from shardwright.comm.worker import Worker
from shardwright.cost.hardware import peak_flops
from shardwright.data.dataset import Dataset
from shardwright.errors import DataError
from shardwright.layout.mesh import Topology
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import compose
from shardwright.plan.communication import estimated_communication
from shardwright.plan.memory import estimated_memory
from shardwright.plan.plan import Plan
from shardwright.record.records import MemoryRecord, StepRecord, ValidationRecord
from shardwright.record.store import JsonLines, read_json, write_json
from shardwright.train.console import ConsoleProgress, print_summary
from shardwright.train.directory import RunDirectory
from shardwright.train.loop import Observer, Outcome, TrainingLoop
from shardwright.train.prepare import Prepared, open_data, prepare_run


class Records:
    """Writes steps.jsonl and validation.jsonl, and keeps the step records for the summary."""

    def __init__(self, directory: RunDirectory) -> None:
        self._steps, self._validation = JsonLines(directory.steps), JsonLines(directory.validation)
        self.steps: list[StepRecord] = []

    def on_step(self, record: StepRecord) -> None:
        """See `Observer`."""
        self._steps.append(record.as_json())
        self.steps.append(record)

    def on_validation(self, record: ValidationRecord) -> None:
        """See `Observer`."""
        self._validation.append(record.as_json())


def main(worker: Worker, arguments: tuple[str, ...]) -> None:
    """Train as one rank. `arguments`: a run directory that is ready or "", the recipe, and for a directory still to be
    made the one asked for or "" and the overrides."""
    directory, recipe, run_dir, *overrides = arguments
    if directory:
        prepared = Prepared(RunDirectory(Path(directory)).read_plan(), RunDirectory(Path(directory)))
    else:
        prepared = _prepare_together(worker, recipe, run_dir, overrides)
    plan = prepared.plan
    if worker.device.type == "cpu":
        keep_freed_memory()
    dataset = open_data(plan.spec, plan.architecture.vocab)
    mesh = Mesh(plan.topology, worker.device)
    _check_same_data(dataset, mesh)
    _train(worker, prepared, dataset, mesh, recipe)


def _check_same_data(dataset: Dataset, mesh: Mesh) -> None:
    """Machines with different texts under one name would train on a mixture, silently."""
    first = broadcast_text(dataset.fingerprint if mesh.rank == 0 else None, mesh.world, mesh.device)
    if dataset.fingerprint != first:
        raise DataError(
            f"data.corpus: rank {mesh.rank} reads other data than rank 0 (fingerprints {dataset.fingerprint}, {first})",
            "put the corpus, or a directory made by `shardwright data prepare`, where all machines read the same",
        )


def _prepare_together(worker: Worker, recipe: str, run_dir: str, overrides: list[str]) -> Prepared:
    """In a job that others started, rank 0 resolves the plan and makes the directory, and tells the others."""
    world = Mesh(Topology(replicate=worker.world_size), worker.device).world
    text = None
    if worker.rank == 0:
        made = prepare_run(recipe, overrides, run_dir or None, worker.world_size, worker.device.type)
        text = json.dumps({"plan": made.plan.model_dump(mode="json"), "directory": str(made.directory.path.resolve())})
    told = json.loads(broadcast_text(text, world, worker.device))
    return Prepared(Plan.model_validate(told["plan"]), RunDirectory(Path(told["directory"])))


def _train(worker: Worker, prepared: Prepared, dataset: Dataset, mesh: Mesh, recipe: str) -> None:
    plan, directory = prepared.plan, prepared.directory
    runtime = compose(plan, mesh)
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    observers: list[Observer] = []
    records = progress = None
    if mesh.rank == 0:
        records, progress = Records(directory), ConsoleProgress(plan)
        observers = [records, progress]
    loop = TrainingLoop(
        runtime,
        optimizer,
        dataset,
        observers,
        stop_requested=lambda: worker.stop.requested is not None,
        peak_flops=peak_flops(_device_name(worker.device), plan.dtype),
    )
    try:
        outcome = loop.run()
    finally:
        if progress is not None:
            progress.close()
    _write_ledgers(directory, runtime.mesh, plan, outcome)
    barrier(mesh.world)
    if records is not None:
        print_summary(recipe, directory, outcome, records.steps, _read_ledgers(directory, plan))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "CPU"


def _write_ledgers(directory: RunDirectory, mesh: Mesh, plan: Plan, outcome: Outcome) -> None:
    measured = outcome.memory
    content = {
        "rank": mesh.rank,
        "coordinate": vars(mesh.coordinate),
        "memory": {
            "estimated": estimated_memory(plan, mesh.rank).as_json(),
            "measured": measured.as_json() if measured else None,
        },
        "communication": {
            "steps": outcome.steps,
            "measured": mesh.ledger.as_records(),
            "estimated_per_step": [record.as_row() for record in estimated_communication(plan, mesh.rank)],
        },
    }
    directory.rank(mesh.rank).parent.mkdir(parents=True, exist_ok=True)
    write_json(directory.rank(mesh.rank), content)


def _read_ledgers(directory: RunDirectory, plan: Plan) -> list[tuple[MemoryRecord, MemoryRecord]]:
    """(estimated, measured) of every rank whose file is here; ranks on other machines may write elsewhere."""
    found = []
    for rank in range(plan.world_size):
        path = directory.rank(rank)
        memory = read_json(path)["memory"] if path.exists() else {}
        if memory.get("measured"):
            found.append((MemoryRecord.from_json(memory["estimated"]), MemoryRecord.from_json(memory["measured"])))
    return found
