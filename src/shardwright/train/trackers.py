"""Experiment trackers: what a run tells TensorBoard and W&B. Rank 0 alone tells them, and only files are written."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from shardwright.errors import RunError
from shardwright.plan.plan import Plan
from shardwright.record.records import StepRecord, ValidationRecord

_FLUSH = 10  # seconds after which TensorBoard's events are in the file
_TOLD = ("loss", "grad_norm", "lr", "tokens_per_second", "mfu")


class Tracker(Protocol):
    """Takes numbers by name, and may fail in any way that its package has."""

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Numbers after so many steps; steps do not go back."""
        ...

    def close(self, failed: bool) -> None:
        """Write what is left; no more will come."""
        ...


class TensorBoard:
    """Event files in RUN/tensorboard, read by `tensorboard --logdir RUN`. Events after `step`, of steps that will be
    done again, are taken back."""

    def __init__(self, plan: Plan, directory: Path, step: int) -> None:
        del plan
        package: Any = import_module("torch.utils.tensorboard")
        self._hook, threading.excepthook = threading.excepthook, self._on_thread_error
        self._writer = package.SummaryWriter(directory / "tensorboard", purge_step=step + 1, flush_secs=_FLUSH)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """See `Tracker`. What the writing thread met comes up here, in a later call."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        self._writer.close()
        threading.excepthook = self._hook  # not where closing failed: the thread may be there still

    def _on_thread_error(self, error: threading.ExceptHookArgs) -> None:
        """The thread that writes events would print its traceback besides."""
        if not type(error.thread).__module__.startswith("tensorboard."):
            self._hook(error)


class WandB:
    """An offline run in RUN/wandb, uploaded by `wandb sync` and by nothing else; the plan is its config.

    Each time that a run goes on is an offline run of its own; the name of the directory groups them.
    """

    def __init__(self, plan: Plan, directory: Path, step: int) -> None:
        del step
        os.environ |= {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}  # read when it is imported
        wandb: Any = import_module("wandb")
        quiet = wandb.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            mode="offline",
            dir=str(directory),
            project="shardwright",
            name=directory.name,
            group=directory.name,
            config=plan.model_dump(mode="json"),
            settings=quiet,
        )

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log(dict(scalars), step=step)

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=int(failed))


_TRACKERS: dict[str, Callable[[Plan, Path, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


def check_installed(names: Sequence[str]) -> None:
    """Raises RunError for a tracker whose package is not there."""
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise RunError(
            f"run.trackers: {' and '.join(missing)} {verb} not installed",
            f"pip install 'shardwright[{','.join(missing)}]', or leave {'it' if len(missing) == 1 else 'them'} out",
        )


def _is_installed(name: str) -> bool:
    """A directory that happens to have the name, as W&B makes one, is no package: it has no file of its own."""
    found = find_spec(name)
    return found is not None and found.origin is not None


class Trackers:
    """Tells the trackers of `run.trackers`, as an observer; a context that closes them.

    One that fails, as on a full disk, is told nothing more; `tell` says so once, and training goes on.
    """

    def __init__(self, plan: Plan, directory: Path, step: int, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._open: dict[str, Tracker] = {}
        for name in plan.spec.run.trackers:
            try:
                self._open[name] = _TRACKERS[name](plan, directory, step)
            except Exception as error:  # of another package: anything
                self._say(name, error)

    def on_step(self, record: StepRecord) -> None:
        """See `Observer`."""
        numbers = {f"train/{name}": getattr(record, name) for name in _TOLD}
        self._log({name: value for name, value in numbers.items() if not isinstance(value, str)}, record.step)

    def on_validation(self, record: ValidationRecord) -> None:
        """See `Observer`."""
        self._log({"validation/loss": record.loss}, record.step)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name, tracker in self._open.items():
            try:
                tracker.close(failed=kind is not None)
            except Exception as problem:
                self._say(name, problem)
        self._open = {}

    def _log(self, scalars: Mapping[str, float], step: int) -> None:
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(scalars, step)
            except Exception as error:
                self._say(name, error)
                del self._open[name]
                with suppress(Exception):
                    tracker.close(failed=True)

    def _say(self, name: str, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        self._tell(f"run.trackers: {name}: {reason.splitlines()[0]}; it is told nothing more")
