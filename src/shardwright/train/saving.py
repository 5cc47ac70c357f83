"""When a run's state is saved, and what is said of it beside the tensors."""

from __future__ import annotations

from collections.abc import Callable

from shardwright.checkpoint.folder import CheckpointFolder
from shardwright.checkpoint.manifest import Training
from shardwright.checkpoint.save import Saver
from shardwright.checkpoint.state import num_updates
from shardwright.data.dataset import Dataset
from shardwright.errors import CheckpointError
from shardwright.record.records import SaveRecord
from shardwright.train.directory import RunDirectory
from shardwright.train.loop import Standing
from shardwright.train.start import Start, stream_of
from shardwright.train.step import Votes


class Checkpoints:
    """Saves every `checkpoint.every` steps, and at the end; see `Saving`."""

    def __init__(
        self,
        start: Start,
        directory: RunDirectory,
        dataset: Dataset,
        tell: Callable[[SaveRecord], None],
        warn: Callable[[str], None],
    ) -> None:
        self._start, self._dataset, self._warn = start, dataset, warn
        self._every = start.runtime.plan.spec.checkpoint.every
        self._problem = ""
        self._saver = Saver(
            CheckpointFolder(directory.checkpoints),
            start.runtime,
            start.optimizer,
            directory.companions,
            tell=tell,
            warn=self._failed,
        )
        self._last = start.standing.step if start.standing.step else None

    def votes(self) -> Votes:
        """See `Saving`."""
        return self._saver.votes()

    def heard(self, votes: Votes) -> None:
        """See `Saving`."""
        self._saver.heard(*votes)

    def after_step(self, standing: Standing) -> None:
        """See `Saving`."""
        if standing.step % self._every == 0:
            self._save(standing)

    def finish(self, standing: Standing) -> None:
        """See `Saving`. Raises CheckpointError where what was trained last could not be saved."""
        self._saver.drain()
        if standing.step != self._last:
            self._save(standing)
            self._saver.drain()
        if self._problem and standing.step == self._last:
            raise CheckpointError(self._problem, "the run has ended without it; mend that and go on with --resume")

    def _save(self, standing: Standing) -> None:
        self._problem, self._last = "", standing.step
        self._saver.save(self._training(standing))

    def _failed(self, problem: str) -> None:
        self._problem = problem
        self._warn(problem)

    def _training(self, standing: Standing) -> Training:
        plan, optimizer = self._start.runtime.plan, self._start.optimizer
        return Training(
            step=standing.step,
            position=standing.position,
            updates=num_updates(self._start.runtime, optimizer),
            skipped=standing.skipped,
            nonfinite=standing.nonfinite,
            validated=standing.validated,
            optimizer=plan.spec.train.optimizer,
            seed=plan.spec.train.seed,
            data=stream_of(plan, self._dataset),
            world_size=plan.world_size,
        )
