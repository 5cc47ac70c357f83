"""Saving under way beside training: one save at a time, whose end every rank learns of at the same step.

Note: no rank is ahead. A save has two phases: every rank writes its file, then rank 0 commits. Whether a rank's part
of the phase has ended, well or badly, is a vote that rides in the step's own reduction; the sum tells every rank alike
when the phase is over and whether it failed. So nothing is agreed on behind the training step's back, a background
thread never communicates, and an error is raised on all ranks at the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch

from shardwright.checkpoint.folder import CheckpointFolder, read_part, write_part
from shardwright.checkpoint.manifest import Manifest, Part, Training, companions_in
from shardwright.checkpoint.resume import first_failed
from shardwright.checkpoint.snapshot import Snapshot
from shardwright.checkpoint.state import num_updates
from shardwright.comm.collectives import all_reduce, barrier, broadcast_text
from shardwright.errors import CheckpointError
from shardwright.optim.optimizers import SGD, AdamW
from shardwright.parallel.compose import Runtime
from shardwright.record.records import SaveRecord
from shardwright.spec.origin import COMPANIONS
from shardwright.units import Bytes, Seconds

_PATIENCE = Seconds(60)  # until a part that another machine wrote is seen here


class Phase(StrEnum):
    """What a save is at."""

    IDLE = "idle"
    WRITING = "writing"
    COMMITTING = "committing"


@dataclass(frozen=True)
class _Save:
    """A save under way: where training stood, when it began, and how long the loop stood still for it."""

    training: Training
    began: float
    stall: Seconds


class Saver:
    """Saves a run's state into its folder of checkpoints, of which the newest `keep` stay.

    `companions` is a directory of small files that go with the weights. `tell` is called on every rank with the record
    of each save that is complete, `warn` with what went wrong, where training goes on.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        runtime: Runtime,
        optimizer: AdamW | SGD,
        companions: Path,
        *,
        tell: Callable[[SaveRecord], None] = lambda _: None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._folder, self._runtime, self._companions = folder, runtime, companions
        self._tell, self._warn = tell, warn
        self._not_pruned = ""
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{folder.path}: cannot be made: {error.strerror}", "give another --run-dir"
            ) from None
        self._snapshot = Snapshot(runtime, optimizer)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._phase = Phase.IDLE
        self._task: Future[Bytes] = _done()
        self._save: _Save | None = None

    def votes(self) -> tuple[float, float]:
        """Whether this rank's part of the present phase has ended, and whether badly: to be summed over the world."""
        ended = self._phase is not Phase.IDLE and self._task.done()
        return float(ended), float(ended and self._task.exception() is not None)

    def heard(self, ended: float, failed: float) -> None:
        """Go on as the sum of the votes says. Raises CheckpointError, on all ranks, where a save has failed and
        `checkpoint.on_error` says so."""
        if self._phase is Phase.IDLE or ended < self._runtime.mesh.world.degree:
            return
        if failed:
            self._give_up()
        elif self._phase is Phase.WRITING:
            self._phase = Phase.COMMITTING
            is_first = self._runtime.mesh.rank == 0
            self._task = self._thread.submit(self._commit, self._under_way) if is_first else _done()
        else:
            self._phase = Phase.IDLE
            self._tell(self._record(self._under_way))
            if self._not_pruned:
                self._warn(self._not_pruned)

    def save(self, training: Training) -> None:
        """Begin to save the state as it is now. The loop stands still while it is copied, and before that while an
        earlier save is under way."""
        began = time.perf_counter()
        self.drain()
        self._snapshot.take()
        self._save = _Save(training, began, Seconds(time.perf_counter() - began))
        self._phase = Phase.WRITING
        self._task = self._thread.submit(self._write, training.step)

    def drain(self) -> None:
        """Wait until no save is under way. Raises CheckpointError as `heard` does."""
        mesh = self._runtime.mesh
        while self._phase is not Phase.IDLE:
            self._task.exception()
            votes = torch.tensor(self.votes(), dtype=torch.float64, device=mesh.device)
            all_reduce(votes, mesh.world, reason="checkpoint").wait()
            self.heard(*votes.tolist())

    def close(self) -> None:
        """End the background thread."""
        self._thread.shutdown()

    @property
    def _under_way(self) -> _Save:
        assert self._save is not None, "no save has begun"
        return self._save

    # In the background

    def _write(self, step: int) -> Bytes:
        """Write this rank's file; its bytes."""
        draft = self._folder.begin(step)
        part = self._snapshot.write(draft)
        write_part(draft, part, self._runtime.mesh.rank)
        return Bytes(part.file.bytes)

    def _commit(self, save: _Save) -> Bytes:
        """Make the checkpoint complete, and delete older ones; the bytes of all files."""
        step, plan = save.training.step, self._runtime.plan
        parts = self._parts(step)
        manifest = Manifest(
            architecture=plan.architecture,
            dtype=plan.dtype,
            kinds=self._snapshot.kinds,
            tensors={name: shape for part in parts for name, shape in part.tensors.items()},
            files=tuple(part.file for part in parts),
            companions=companions_in(self._companions),
            training=save.training,
            plan=plan.model_dump(mode="json"),
        )
        self._folder.commit(step, manifest, self._companions)
        self._not_pruned = ""
        try:
            self._folder.prune(plan.spec.checkpoint.keep, step)
        except OSError as error:
            self._not_pruned = f"checkpoint: an older one could not be deleted: {error.filename}: {error.strerror}"
        return Bytes(manifest.num_bytes)

    def _parts(self, step: int) -> list[Part]:
        """What every rank wrote. Another machine's part may be seen here a little later than it was written."""
        draft, deadline = self._folder.draft(step), time.monotonic() + _PATIENCE
        parts = []
        for rank in range(self._runtime.mesh.world.degree):
            while (part := read_part(draft, rank)) is None:
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{draft}: what rank {rank} wrote is not there",
                        "all ranks must see the same file system: give a --run-dir that is shared",
                    )
                time.sleep(0.05)
            parts.append(part)
        return parts

    # The end

    def _record(self, save: _Save) -> SaveRecord:
        seconds = Seconds(time.perf_counter() - save.began)
        return SaveRecord(save.training.step, self._task.result(), save.stall, seconds)

    def _give_up(self) -> None:
        """A save has failed: every rank learns of the first failure, and all say the same."""
        self._phase = Phase.IDLE
        step, mesh = self._under_way.training.step, self._runtime.mesh
        error = self._task.exception()
        first = first_failed(error is not None, mesh)
        assert first is not None, "somebody has voted so"
        text = broadcast_text(_told(error, mesh.rank) if error else None, mesh.world, mesh.device, source=first)
        if mesh.rank == 0:
            self._folder.discard(step)
        barrier(mesh.world)  # its bytes are given back before any rank may end the run
        problem = f"checkpoint: step {step} was not saved: {text}"
        if self._runtime.plan.spec.checkpoint.on_error == "stop":
            raise CheckpointError(problem, 'mend that and go on with --resume; or checkpoint.on_error = "continue"')
        self._warn(problem)


def save(folder: Path, runtime: Runtime, optimizer: AdamW | SGD, *, step: int, position: int = 0) -> Path:
    """Save a state into a folder of checkpoints, of which `checkpoint.keep` stay, and return when it is complete: the
    checkpoint's directory. To be called on every rank. `position` is the next sample of the data. Raises
    CheckpointError."""
    train, problems = runtime.plan.spec.train, list[str]()
    saver = Saver(CheckpointFolder(folder), runtime, optimizer, folder / COMPANIONS, warn=problems.append)
    training = Training(
        step=step,
        position=position,
        updates=num_updates(runtime, optimizer),
        optimizer=train.optimizer,
        seed=train.seed,
        data="",
        world_size=runtime.plan.world_size,
    )
    try:
        saver.save(training)
        saver.drain()
    finally:
        saver.close()
    if problems:
        raise CheckpointError(problems[0], "mend that and save again")
    return CheckpointFolder(folder).of_step(step)


def _told(error: BaseException, rank: int) -> str:
    """What went wrong on a rank, in one line."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"rank {rank}: {where}{error.strerror or error}"
    return f"rank {rank}: {error}" if isinstance(error, CheckpointError) else f"rank {rank}: {error!r}"


def _done() -> Future[Bytes]:
    """A task that has nothing to do."""
    future: Future[Bytes] = Future()
    future.set_result(Bytes(0))
    return future
