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
from shardwright.train.batches import rank_batch
from shardwright.train.evaluate import evaluate
from shardwright.train.ledger import StepMemory
from shardwright.train.step import StepResult, train_step
from shardwright.units import Seconds


class Observer(Protocol):
    """Is told what happens; progress bars, records and later checkpoints are observers, not lines of the loop."""

    def on_step(self, record: StepRecord) -> None:
        """A step has ended."""
        ...

    def on_validation(self, record: ValidationRecord) -> None:
        """An evaluation has ended."""
        ...


@dataclass
class Outcome:
    """How a run ended. `memory` is what the rank held in its first step."""

    steps: int = 0
    skipped: int = 0
    stopped: bool = False
    seconds: float = 0.0
    first_validation: ValidationRecord | None = None
    last_validation: ValidationRecord | None = None
    memory: MemoryRecord | None = None


@dataclass
class TrainingLoop:
    """Runs a plan's steps on a dataset. `stop_requested` is asked once a step; any rank's yes stops all of them."""

    runtime: Runtime
    optimizer: AdamW | SGD
    dataset: Dataset
    observers: Sequence[Observer] = ()
    stop_requested: Callable[[], bool] = lambda: False
    peak_flops: float | str = "unknown"
    outcome: Outcome = field(default_factory=Outcome)

    def run(self) -> Outcome:
        """All steps of the plan, or up to `train.stop_after`, with evaluations before, between and after them."""
        train, began = self.runtime.plan.spec.train, time.perf_counter()
        last = min(train.steps, train.stop_after) if train.stop_after else train.steps
        nonfinite = 0
        self._validate(0)
        for step in range(last):
            result = self._step(step)
            nonfinite = 0 if result.applied else nonfinite + 1
            self.outcome.skipped += not result.applied
            self.outcome.steps = step + 1
            if nonfinite >= train.max_nonfinite_steps:
                raise _diverged(result, step + 1, nonfinite)
            if result.stop:
                self.outcome.stopped = True
                break
            if step + 1 == last or (self._every and (step + 1) % self._every == 0):
                self._validate(step + 1)
        self.runtime.states.finish()
        self.outcome.seconds = time.perf_counter() - began
        return self.outcome

    @property
    def _every(self) -> int:
        return self.runtime.plan.spec.data.eval_every

    def _step(self, step: int) -> StepResult:
        plan, began = self.runtime.plan, time.perf_counter()
        batch = rank_batch(self.runtime, self.dataset.train, step)
        lr = learning_rate(plan.spec.train, step)
        with StepMemory(self.runtime, self.optimizer) if step == 0 else nullcontext() as memory:
            result = train_step(self.runtime, self.optimizer, batch, lr, stop=self.stop_requested())
        if memory is not None:
            self.outcome.memory = memory.record
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
        record = evaluate(self.runtime, self.dataset.validation, step)
        self.outcome.first_validation = self.outcome.first_validation or record
        self.outcome.last_validation = record
        for observer in self.observers:
            observer.on_validation(record)


def _diverged(result: StepResult, step: int, count: int) -> RunError:
    return RunError(
        f"train.max_nonfinite_steps: {count} steps in a row up to step {step} were not finite "
        f"(loss {result.loss:g}, gradient norm {result.grad_norm:g}) and were skipped",
        "lower train.lr, lengthen train.warmup_steps, or use train.dtype = fp32",
    )
