"""The training step. It knows no technique: what is parallel is in the runtime."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwright.comm.collectives import all_reduce
from shardwright.data.batch import Batch
from shardwright.optim.owned import Optimizer
from shardwright.parallel.compose import Runtime

Votes = tuple[float, float]
"""Two numbers of each rank that ride in the step's reduction: how a save that is under way goes."""


@dataclass(frozen=True)
class StepResult:
    """What a step did; the same on every rank.

    loss: mean over the global batch's targets. grad_norm: global, before clipping. num_tokens: tokens of the global
    batch. applied: whether parameters were updated; a step whose loss or norm is not finite is not. stop: whether some
    rank was asked to stop. votes: the ranks' votes, summed.
    """

    loss: float
    grad_norm: float
    num_tokens: int
    num_targets: int
    lr: float
    applied: bool
    stop: bool
    votes: Votes


def to_device(batch: Batch, micro_batch_size: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """A rank's sequences as microbatches of (tokens, targets)."""
    tokens, targets = (torch.from_numpy(array).to(device) for array in (batch.tokens, batch.targets))
    return list(zip(tokens.split(micro_batch_size), targets.split(micro_batch_size), strict=True))


def count_targets(batch: Batch, runtime: Runtime) -> Tensor:
    """Targets of the global batch that carry loss, an fp64 scalar; known before any backward."""
    count = torch.tensor(batch.num_targets(), dtype=torch.float64, device=runtime.mesh.device)
    all_reduce(count, runtime.mesh.data, reason="loss/count").wait()
    return count


@dataclass(frozen=True)
class Health:
    """Loss, squared norm, stop requests and votes, summed over the world in one reduction that all ranks read alike."""

    loss: float
    grad_norm: float
    stop: bool
    votes: Votes

    @staticmethod
    def check(runtime: Runtime, loss: Tensor, stop: bool, votes: Votes) -> Health:
        """Sum what each rank contributes."""
        flags = torch.tensor([stop, *votes], dtype=torch.float64, device=runtime.mesh.device)
        scalars = torch.cat([torch.stack([loss.double(), runtime.states.squared_norm()]), flags])
        all_reduce(scalars, runtime.mesh.world, reason="health").wait()
        total_loss, squared, stops, *sums = scalars.tolist()
        return Health(total_loss, math.sqrt(squared) if squared >= 0 else math.nan, stops > 0, (sums[0], sums[1]))

    @property
    def finite(self) -> bool:
        """Whether the step may be applied."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def clip_scale(norm: float, max_norm: float) -> float:
    """What gradients are multiplied by so that their global norm is at most `max_norm`; 0 switches it off."""
    if max_norm == 0:
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6))  # torch's clip_grad_norm_ has the same 1e-6


def train_step(
    runtime: Runtime,
    optimizer: Optimizer,
    batch: Batch,
    lr: float,
    *,
    stop: bool = False,
    votes: Votes = (0.0, 0.0),
    before_update: Callable[[float], None] | None = None,
) -> StepResult:
    """One optimizer step on this rank's part of a global batch.

    `before_update` is called with the clip scale when owned gradients are complete; proofs look at them there.
    """
    train = runtime.plan.spec.train
    num_targets = count_targets(batch, runtime)
    microbatches = to_device(batch, train.micro_batch_size, runtime.mesh.device)
    loss = runtime.pipeline.run(microbatches, 1.0 / num_targets.clamp(min=1))
    runtime.mesh.whereabouts.begin("gradients")
    runtime.states.collect_gradients()
    health = Health.check(runtime, loss, stop, votes)
    scale = clip_scale(health.grad_norm, train.max_grad_norm)
    targets = int(num_targets)  # here, where the host has just waited for the device, and not behind the update
    if before_update is not None:
        before_update(scale)
    if health.finite:
        runtime.mesh.whereabouts.begin("update")
        runtime.states.update(optimizer, lr, scale)
    return StepResult(
        loss=health.loss,
        grad_norm=health.grad_norm,
        num_tokens=train.global_batch_size * runtime.plan.sequence_length,
        num_targets=targets,
        lr=lr,
        applied=health.finite,
        stop=health.stop,
        votes=health.votes,
    )
