"""A rank of a training run, from joining the world to the last record."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from shardwright.comm.collectives import barrier, broadcast_text
from shardwright.comm.mesh import Mesh
from shardwright.comm.worker import Worker
from shardwright.cost.hardware import peak_flops
from shardwright.data.dataset import Dataset
from shardwright.errors import DataError
from shardwright.layout.mesh import Topology
from shardwright.plan.communication import estimated_communication
from shardwright.plan.memory import estimated_memory
from shardwright.plan.plan import Plan
from shardwright.record.records import MemoryRecord, SaveRecord, StepRecord, ValidationRecord
from shardwright.record.store import JsonLines, read_json, read_lines, write_json
from shardwright.report.files import write_report
from shardwright.train.console import ConsoleProgress, make_console, print_summary
from shardwright.train.directory import RunDirectory
from shardwright.train.environment import environment
from shardwright.train.loop import NotSaving, Observer, Outcome, TrainingLoop
from shardwright.train.prepare import Prepared, Request, open_data, prepare_run
from shardwright.train.saving import Checkpoints
from shardwright.train.start import start
from shardwright.train.trackers import Trackers


class Records:
    """Writes steps.jsonl, validation.jsonl and checkpoints.jsonl, and keeps the step records for the summary.

    `warn` is told of what cannot be written; training goes on, and the rows are tried again.
    """

    def __init__(self, directory: RunDirectory, warn: Callable[[str], None]) -> None:
        self._warn = warn
        earlier = list(read_lines(directory.validation)) if directory.validation.exists() else []
        self.first_validation = ValidationRecord(**earlier[0]) if earlier else None
        self._steps, self._validation = JsonLines(directory.steps), JsonLines(directory.validation)
        self._saves = JsonLines(directory.saves)
        self.steps: list[StepRecord] = []

    def on_step(self, record: StepRecord) -> None:
        """See `Observer`."""
        self._append(self._steps, record)
        self.steps.append(record)

    def on_validation(self, record: ValidationRecord) -> None:
        """See `Observer`."""
        self._append(self._validation, record)

    def on_save(self, record: SaveRecord) -> None:
        """A checkpoint is complete."""
        self._append(self._saves, record)

    def _append(self, lines: JsonLines, record: StepRecord | ValidationRecord | SaveRecord) -> None:
        try:
            lines.append(record.as_json())
        except OSError as error:
            self._warn(f"{lines.path}: {error.strerror}; its rows are kept and tried again")

    def finish(self) -> None:
        """Say what is missing in the files."""
        for lines in (self._steps, self._validation, self._saves):
            if lines.behind:
                self._warn(f"{lines.path}: {lines.behind} rows could not be written")


def main(worker: Worker, arguments: tuple[str, ...]) -> None:
    """Train as one rank. `arguments`: a run directory that is ready or "", and what was asked for."""
    directory, request = arguments[0], Request.from_json(arguments[1])
    if directory:
        own = RunDirectory(Path(directory))
        prepared = Prepared(own.read_plan(), own, request.resume)
    else:
        prepared = _prepare_together(worker, request)
    if worker.attempt:  # the ranks were started anew: what the last ones saved is in the directory
        prepared = replace(prepared, resume=True)
    dataset = open_data(prepared.plan.spec, prepared.plan.architecture.vocab)
    mesh = worker.mesh(prepared.plan.topology)
    _check_same_data(dataset, mesh)
    _train(worker, prepared, dataset, mesh, request.recipe)


def _check_same_data(dataset: Dataset, mesh: Mesh) -> None:
    """Machines with different texts under one name would train on a mixture, silently."""
    first = broadcast_text(dataset.fingerprint if mesh.rank == 0 else None, mesh.world, mesh.device)
    if dataset.fingerprint != first:
        raise DataError(
            f"data.corpus: rank {mesh.rank} reads other data than rank 0 (fingerprints {dataset.fingerprint}, {first})",
            "put the corpus, or a directory made by `shardwright data prepare`, where all machines read the same",
        )


def _prepare_together(worker: Worker, request: Request) -> Prepared:
    """In a job that others started, rank 0 resolves the plan and makes the directory, and tells the others."""
    world = worker.mesh(Topology(replicate=worker.world_size)).world
    if worker.attempt and request.run_dir:  # not in a directory that another run of the recipe may be using
        request = replace(request, resume=True)
    text = None
    if worker.rank == 0:
        made = prepare_run(request, worker.world_size, worker.device.type)
        directory = str(made.directory.path.resolve())
        text = json.dumps({"plan": made.plan.model_dump(mode="json"), "directory": directory, "resume": made.resume})
    told = json.loads(broadcast_text(text, world, worker.device))
    return Prepared(Plan.model_validate(told["plan"]), RunDirectory(Path(told["directory"])), told["resume"])


def _train(worker: Worker, prepared: Prepared, dataset: Dataset, mesh: Mesh, recipe: str) -> None:
    plan, directory = prepared.plan, prepared.directory
    tell = Teller(mesh.rank == 0)
    begin = start(plan, directory, mesh, dataset, resume=prepared.resume, tell=tell)
    observers: list[Observer] = []
    records = progress = None
    tracked: Trackers | nullcontext[None] = nullcontext()
    if mesh.rank == 0:
        records, progress = Records(directory, tell), ConsoleProgress(plan, begin.standing.step)
        tell.progress = progress
        tracked = Trackers(plan, directory.path, begin.standing.step, tell)
        observers = [records, progress, tracked]

    def saved(record: SaveRecord) -> None:
        for observer in (records, progress):
            if observer is not None:
                observer.on_save(record)

    loop = TrainingLoop(
        begin.runtime,
        begin.optimizer,
        dataset,
        observers,
        stop_requested=lambda: worker.stop.requested is not None,
        peak_flops=peak_flops(_device_name(worker.device), plan.dtype),
        standing=begin.standing,
        saving=Checkpoints(begin, directory, dataset, saved, tell) if plan.spec.checkpoint.every else NotSaving(),
    )
    try:
        with tracked:
            outcome = loop.run()
    finally:
        if progress is not None:
            progress.close()
    mesh.whereabouts.begin("records")
    try:
        _write_ledgers(directory, mesh, plan, outcome)
    except OSError as error:
        make_console().print(f"{error.filename}: {error.strerror}: the ledger of rank {mesh.rank} is not there")
    barrier(mesh.world)
    if records is not None:
        records.finish()
        outcome.first_validation = records.first_validation or outcome.first_validation
        ledgers, report = _read_ledgers(directory, plan), _write_report(directory, tell)
        print_summary(recipe, directory, outcome, records.steps, ledgers, report)


class Teller:
    """Says on rank 0 alone what a person should know: above the progress bar, once there is one."""

    def __init__(self, speaks: bool) -> None:
        self._speaks = speaks
        self.progress: ConsoleProgress | None = None

    def __call__(self, text: str) -> None:
        """Print a line."""
        if self.progress is not None:
            self.progress.tell(text)
        elif self._speaks:
            make_console().print(text, style="yellow", soft_wrap=True)


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
        "timeline": outcome.timeline.as_json() if outcome.timeline else None,
        "environment": environment(mesh.device),
    }
    directory.rank(mesh.rank).parent.mkdir(exist_ok=True)
    write_json(directory.rank(mesh.rank), content)


def _write_report(directory: RunDirectory, tell: Teller) -> Path | None:
    """The page of the run; None where it could not be made, which is said and harms nothing else."""
    try:
        return write_report([directory.path])[0]
    except Exception as error:  # training is done, whatever is wrong with its picture
        tell(f"no report was written: {error}".splitlines()[0])
        return None


def _read_ledgers(directory: RunDirectory, plan: Plan) -> list[tuple[MemoryRecord, MemoryRecord]]:
    """(estimated, measured) of every rank whose file is here; ranks on other machines may write elsewhere."""
    found = []
    for rank in range(plan.world_size):
        path = directory.rank(rank)
        memory = read_json(path)["memory"] if path.exists() else {}
        if memory.get("measured"):
            found.append((MemoryRecord.from_json(memory["estimated"]), MemoryRecord.from_json(memory["measured"])))
    return found
