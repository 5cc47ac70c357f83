"""The run directory: one home for everything that a run leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardwright.errors import RunError
from shardwright.plan.plan import Plan
from shardwright.record.store import cut_lines, read_json, write_json
from shardwright.spec.origin import CHECKPOINTS, COMPANIONS, steps_in

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

    @property
    def saves(self) -> Path:
        """One SaveRecord a line."""
        return self.path / "checkpoints.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Of each step that was saved, a directory."""
        return self.path / CHECKPOINTS

    @property
    def companions(self) -> Path:
        """The small files that go with the weights into every checkpoint, such as the tokenizer."""
        return self.path / COMPANIONS

    def rank(self, rank: int) -> Path:
        """The ledgers of one rank."""
        return self.path / "ranks" / f"{rank}.json"

    @property
    def holds_run(self) -> bool:
        """Whether a run was begun here."""
        return self.plan.exists() or self.steps.exists() or bool(steps_in(self.checkpoints))

    def newest_checkpoint(self) -> Path | None:
        """The complete checkpoint of the latest step, whole or not."""
        saved = steps_in(self.checkpoints)
        return saved[-1] if saved else None

    def read_plan(self) -> Plan:
        """The plan of the run."""
        return Plan.model_validate(read_json(self.plan))

    def cut(self, step: int) -> None:
        """Forget the records of what came after a step: it will be done again."""
        for path in (self.steps, self.validation, self.saves):
            cut_lines(path, lambda row: row["step"] <= step)

    @staticmethod
    def create(asked: Path | None, recipe: Path, plan: Plan, *, again: bool = False) -> RunDirectory:
        """A directory for a run, with its plan in it: the one asked for, or runs/<recipe>-<number>.

        Raises RunError where it cannot be written, or already holds a run and is not to be used `again`.
        """
        if asked is not None and RunDirectory(asked).holds_run and not again:
            raise RunError(
                f"--run-dir: {asked} already holds a run",
                "give another --run-dir, leave it out for a new one, or go on from its checkpoint with --resume",
            )
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

    @staticmethod
    def newest(recipe: Path) -> RunDirectory | None:
        """The run of a recipe that was begun last in the default place."""
        found = [RunDirectory(path) for _, path in sorted(_numbers(recipe.stem))]
        return next((directory for directory in reversed(found) if directory.holds_run), None)


def _numbers(stem: str) -> Iterator[tuple[int, Path]]:
    for path in _RUNS.glob(f"{stem}-*") if _RUNS.is_dir() else ():
        number = path.name[len(stem) + 1 :]
        if number.isdecimal():
            yield int(number), path


def _numbered(stem: str) -> Path:
    """Make and return the next runs/<stem>-<number>; two runs that start together get two."""
    number = max((number for number, _ in _numbers(stem)), default=0) + 1
    while True:
        path = _RUNS / f"{stem}-{number}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
