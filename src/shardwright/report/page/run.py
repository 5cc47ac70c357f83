"""A run directory as the report reads it: by the names of its files, without the engine that wrote them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from shardwright.errors import RunError
from shardwright.plan.plan import Plan
from shardwright.record.communication import CommunicationRecord
from shardwright.record.records import MemoryRecord, Origin, SaveRecord, StepRecord, ValidationRecord
from shardwright.record.store import read_json, read_lines
from shardwright.record.timeline import TimelineRecord

Record = TypeVar("Record")

_DAMAGED = KeyError, TypeError, ValueError, AttributeError
"""What records of another form raise where they are read."""


@dataclass(frozen=True)
class RankFile:
    """What one rank left in ranks/: `steps` is how many the measured communication covers."""

    rank: int
    estimated_memory: MemoryRecord
    measured_memory: MemoryRecord | None
    steps: int
    sent: tuple[CommunicationRecord, ...]
    estimated_sent: tuple[CommunicationRecord, ...]
    timeline: TimelineRecord | None
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """A run, as far as it has come. `ranks` holds those whose file is here; others may lie on other machines."""

    path: Path
    name: str
    plan: Plan
    steps: tuple[StepRecord, ...]
    validation: tuple[ValidationRecord, ...]
    saves: tuple[SaveRecord, ...]
    ranks: Mapping[int, RankFile]

    @cached_property
    def tokens_per_second(self) -> float | None:
        """The median over all steps but the first, as in the summary of the run; None before there is one."""
        rates = sorted(step.tokens_per_second for step in self.steps[1:] or self.steps)
        return rates[len(rates) // 2] if rates else None

    @cached_property
    def seconds_per_step(self) -> float | None:
        """The median over all steps but the first."""
        return median(step.seconds for step in self.steps[1:] or self.steps) if self.steps else None

    @property
    def state(self) -> str:
        """How far it came; whether it goes on at this moment is not in its records."""
        asked, until = self.plan.spec.train.steps, self.plan.spec.train.stop_after
        done = self.steps[-1].step if self.steps else 0
        if not done:
            return "no steps yet"
        if done >= asked:
            return "complete"
        if until and done >= until:
            return f"stopped after {done} of {asked} steps, as asked"
        return f"at step {done} of {asked}: running, or ended early"


def read_run(path: Path) -> Run:
    """Reads a run directory. Raises RunError where it is none, or where a file of it cannot be read."""
    if not path.is_dir():
        raise RunError(f"RUN: {path}: no such directory", "give a run directory, such as runs/quickstart-1")
    if not (path / "plan.json").is_file():
        raise RunError(f"RUN: {path} is no run directory: it has no plan.json", "give one that `train` has written")
    files = sorted((path / "ranks").glob("*.json"), key=lambda file: (len(file.stem), file.stem))
    ranks = [_read(file, lambda file: _rank_file(read_json(file))) for file in files if file.stem.isdecimal()]
    return Run(
        path=path,
        name=path.resolve().name,
        plan=_read(path / "plan.json", lambda file: Plan.model_validate(read_json(file))),
        steps=_rows(path / "steps.jsonl", StepRecord),
        validation=_rows(path / "validation.jsonl", ValidationRecord),
        saves=_rows(path / "checkpoints.jsonl", SaveRecord),
        ranks={found.rank: found for found in ranks},
    )


def _rows(path: Path, record: Callable[..., Record]) -> tuple[Record, ...]:
    if not path.is_file():
        return ()
    return _read(path, lambda file: tuple(record(**row) for row in read_lines(file)))


def _read(path: Path, read: Callable[[Path], Record]) -> Record:
    return read_file(
        path, read, "train", "restore it; of ranks/ and *.jsonl, files that are not there are left out of the report"
    )


def read_file(path: Path, read: Callable[[Path], Record], command: str, way_out: str) -> Record:
    """What `read` makes of a file that `command` wrote. Raises RunError where it cannot be read."""
    try:
        return read(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}", "mend its permissions, or copy the run") from None
    except _DAMAGED as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise RunError(
            f"{path}: damaged, or not written by `{command}`: {type(error).__name__}: {reason}", way_out
        ) from None


def _rank_file(fields: dict[str, Any]) -> RankFile:
    rank, memory, communication = int(fields["rank"]), fields["memory"], fields["communication"]
    measured, timeline = memory["measured"], fields["timeline"]

    def sent(rows: str, origin: Origin) -> tuple[CommunicationRecord, ...]:
        return tuple(CommunicationRecord.of_row(row, rank, origin) for row in communication[rows])

    return RankFile(
        rank=rank,
        estimated_memory=MemoryRecord.from_json(memory["estimated"]),
        measured_memory=MemoryRecord.from_json(measured) if measured else None,
        steps=int(communication["steps"]),
        sent=sent("measured", Origin.MEASURED),
        estimated_sent=sent("estimated_per_step", Origin.ESTIMATED),
        timeline=TimelineRecord.from_json(timeline, rank) if timeline else None,
        environment=dict(fields.get("environment", {})),
    )
