"""The training loop: steps, evaluations, and observers that are told of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from shardwright.cost.hardware import mfu
from shardwright.data.dataset import Dataset
from shardwright.errors import RunError
from shardwright.optim.optimizers import SGD, AdamW
from shardwright.optim.schedule import learning_rate
from shardwright.parallel.compose import Runtime
from shardwright.record.records import MemoryRecord, StepRecord, ValidationRecord
from shardwright.record.timeline import TimelineRecord
from shardwright.train.batches import batch_at
from shardwright.train.evaluate import evaluate
from shardwright.train.ledger import StepMemory
from shardwright.train.step import StepResult, Votes, train_step
from shardwright.train.timeline import StepTimeline
from shardwright.units import Seconds


@dataclass
class Standing:
    """Where training stands: steps done, the next sample of the stream, steps that were skipped because they were not
    finite, how many of the last ones in a row, and the step after which the last evaluation was."""

    step: int = 0
    position: int = 0
    skipped: int = 0
    nonfinite: int = 0
    validated: int | None = None


class Saving(Protocol):
    """Saves state beside the steps. `votes` go into each step's reduction, and what they add up to comes back."""

    def votes(self) -> Votes:
        """This rank's part."""
        ...

    def heard(self, votes: Votes) -> None:
        """Their sum. Raises CheckpointError where the run is to end for it."""
        ...

    def after_step(self, standing: Standing) -> None:
        """Begin to save, where it is time."""
        ...

    def finish(self, standing: Standing) -> None:
        """Save what is not yet saved, and return when it is."""
        ...


class NotSaving:
    """checkpoint.every = 0."""

    def votes(self) -> Votes:
        """See `Saving`."""
        return 0.0, 0.0

    def heard(self, votes: Votes) -> None:
        """See `Saving`."""

    def after_step(self, standing: Standing) -> None:
        """See `Saving`."""

    def finish(self, standing: Standing) -> None:
        """See `Saving`."""


class Observer(Protocol):
    """Is told what happens; progress bars and records are observers, not lines of the loop."""

    def on_step(self, record: StepRecord) -> None:
        """A step has ended."""
        ...

    def on_validation(self, record: ValidationRecord) -> None:
        """An evaluation has ended."""
        ...


@dataclass
class Outcome:
    """How a run ended: the steps that it did, since it went on. `memory` is what the rank held in the first of them,
    `timeline` what it did when in a later one, if there was one."""

    steps: int = 0
    skipped: int = 0
    stopped: bool = False
    seconds: float = 0.0
    first_validation: ValidationRecord | None = None
    last_validation: ValidationRecord | None = None
    memory: MemoryRecord | None = None
    timeline: TimelineRecord | None = None


_TIMED = 5
"""Steps before the one whose times are recorded: the first ones are slower."""


@dataclass
class TrainingLoop:
    """Runs a plan's steps on a dataset, from where `standing` says. `stop_requested` is asked once a step; any rank's
    yes stops all of them."""

    runtime: Runtime
    optimizer: AdamW | SGD
    dataset: Dataset
    observers: Sequence[Observer] = ()
    stop_requested: Callable[[], bool] = lambda: False
    peak_flops: float | str = "unknown"
    standing: Standing = field(default_factory=Standing)
    saving: Saving = field(default_factory=NotSaving)
    outcome: Outcome = field(default_factory=Outcome)

    def run(self) -> Outcome:
        """All steps of the plan, or up to `train.stop_after`, with evaluations before, between and after them."""
        train, began = self.runtime.plan.spec.train, time.perf_counter()
        last = min(train.steps, train.stop_after) if train.stop_after else train.steps
        standing, first = self.standing, self.standing.step
        if standing.validated != first and (first == 0 or self._is_validated(first)):
            self._validate(first)
        while standing.step < last:
            result = self._step(self._watcher(standing.step - first, last - first))
            self._stand(result)
            if standing.nonfinite >= train.max_nonfinite_steps:
                raise _diverged(result, standing.step, standing.nonfinite)
            self.saving.heard(result.votes)
            if result.stop and standing.step < last:
                self.outcome.stopped = True
                break
            if standing.step == last or self._is_validated(standing.step):
                self._validate(standing.step)
            self.runtime.mesh.whereabouts.begin("save")
            self.saving.after_step(standing)
        self.runtime.mesh.whereabouts.begin("save")
        self.saving.finish(standing)
        self.runtime.states.finish()
        self.outcome.steps = standing.step - first
        self.outcome.seconds = time.perf_counter() - began
        return self.outcome

    def _stand(self, result: StepResult) -> None:
        """Count a step."""
        self.standing.step += 1
        self.standing.position += self.runtime.plan.spec.train.global_batch_size
        self.standing.nonfinite = 0 if result.applied else self.standing.nonfinite + 1
        self.standing.skipped += not result.applied
        self.outcome.skipped += not result.applied

    def _is_validated(self, step: int) -> bool:
        """Whether the loss on held-out text is taken after so many steps, whichever is the last."""
        every = self.runtime.plan.spec.data.eval_every
        return bool(every) and step % every == 0

    def _watcher(self, index: int, count: int) -> StepMemory | StepTimeline | None:
        """What records a step of a run of so many: the memory of the first, the time of a later one."""
        if index == 0:
            return StepMemory(self.runtime, self.optimizer)
        return StepTimeline(self.runtime.mesh, self.standing.step + 1) if index == min(_TIMED, count - 1) else None

    def _step(self, watcher: StepMemory | StepTimeline | None) -> StepResult:
        plan, began, step = self.runtime.plan, time.perf_counter(), self.standing.step
        self.runtime.mesh.whereabouts.begin(f"step {step + 1}")
        batch = batch_at(self.runtime, self.dataset.train, self.standing.position)
        lr = learning_rate(plan.spec.train, step)
        with watcher or nullcontext():
            votes, stop = self.saving.votes(), self.stop_requested()
            result = train_step(self.runtime, self.optimizer, batch, lr, stop=stop, votes=votes)
        if isinstance(watcher, StepMemory):
            self.outcome.memory = watcher.record
        elif watcher is not None:
            self.outcome.timeline = watcher.record
        seconds = time.perf_counter() - began
        rate = result.num_tokens / seconds
        flops = plan.architecture.flops_per_token(plan.sequence_length)
        record = StepRecord(
            step=step + 1,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            num_tokens=result.num_tokens,
            num_targets=result.num_targets,
            seconds=Seconds(seconds),
            tokens_per_second=rate,
            mfu=mfu(flops, rate, plan.world_size, self.peak_flops),
            applied=result.applied,
        )
        for observer in self.observers:
            observer.on_step(record)
        return result

    def _validate(self, step: int) -> None:
        if self.dataset.validation is None:
            return
        self.runtime.mesh.whereabouts.begin("validation")
        record = evaluate(self.runtime, self.dataset.validation, step)
        self.outcome.first_validation = self.outcome.first_validation or record
        self.outcome.last_validation = record
        self.standing.validated = step
        for observer in self.observers:
            observer.on_validation(record)


def _diverged(result: StepResult, step: int, count: int) -> RunError:
    return RunError(
        f"train.max_nonfinite_steps: {count} steps in a row up to step {step} were not finite "
        f"(loss {result.loss:g}, gradient norm {result.grad_norm:g}) and were skipped",
        "lower train.lr, lengthen train.warmup_steps, or use train.dtype = fp32",
    )
