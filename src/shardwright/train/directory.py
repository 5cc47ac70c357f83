"""The run directory: one home for everything that a run leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shardwright.errors import RunError
from shardwright.plan.plan import Plan
from shardwright.record.store import read_json, write_json

_RUNS = Path("runs")


@dataclass(frozen=True)
class RunDirectory:
    """Paths within a run directory."""

    path: Path

    @property
    def plan(self) -> Path:
        """The plan, complete."""
        return self.path / "plan.json"

    @property
    def steps(self) -> Path:
        """One StepRecord a line."""
        return self.path / "steps.jsonl"

    @property
    def validation(self) -> Path:
        """One ValidationRecord a line."""
        return self.path / "validation.jsonl"

    def rank(self, rank: int) -> Path:
        """The ledgers of one rank."""
        return self.path / "ranks" / f"{rank}.json"

    def read_plan(self) -> Plan:
        """The plan of the run."""
        return Plan.model_validate(read_json(self.plan))

    @staticmethod
    def create(asked: Path | None, recipe: Path, plan: Plan) -> RunDirectory:
        """A directory for a new run, with its plan in it: the one asked for, or runs/<recipe>-<number>.

        Raises RunError where it cannot be written, or already holds a run.
        """
        if asked is not None:
            _refuse_held(asked)
        try:
            path = _numbered(recipe.stem) if asked is None else asked
            (path / "ranks").mkdir(parents=True, exist_ok=True)
            directory = RunDirectory(path)
            write_json(directory.plan, plan.model_dump(mode="json"))
        except OSError as error:
            where = asked if asked is not None else _RUNS
            reason = error.strerror or error
            raise RunError(f"--run-dir: {where} cannot be written: {reason}", "give another --run-dir") from None
        return directory


def _refuse_held(path: Path) -> None:
    if (path / "plan.json").exists() or (path / "steps.jsonl").exists():
        raise RunError(
            f"--run-dir: {path} already holds a run",
            "give another --run-dir, leave it out for a new one, or go on from its checkpoint with --resume",
        )


def _numbered(stem: str) -> Path:
    """Make and return the first free runs/<stem>-<number>; two runs that start together get two."""
    number = 1
    while True:
        path = _RUNS / f"{stem}-{number}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
