"""Shardwright's side of a race, and its ceiling: the same step with transfers for which nobody waits."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import Step
from shardwright.comm import collectives, line
from shardwright.comm.mesh import Groups, Mesh
from shardwright.data.samples import RandomSamples
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import compose
from shardwright.plan.plan import Plan
from shardwright.train.batches import rank_batch
from shardwright.train.step import to_device, train_step


def shardwright(rank: int, world: int, *, plan: Plan) -> Step:
    """Shardwright's own training step."""
    runtime = compose(plan, Mesh(plan.topology, torch.device("cpu")))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, 0)
    return lambda step: train_step(runtime, optimizer, rank_batch(runtime, samples, step), plan.spec.train.lr).loss


class _Silence:
    """Stands for a group of ranks that nothing is sent to."""


class _Over:
    def wait(self, timeout: timedelta | None = None) -> bool:
        return True


class _Transport:
    """torch.distributed for the engine's verbs: in a silent group everything is over at once, and zeros arrive."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def irecv(self, tensor: Tensor, source: int, group: Any) -> Any:
        """See `_Transport`."""
        if not isinstance(group, _Silence):
            return dist.irecv(tensor, source, group=group)
        tensor.zero_()
        return _Over()

    def isend(self, tensor: Tensor, to: int, group: Any) -> Any:
        """See `_Transport`."""
        return _Over() if isinstance(group, _Silence) else dist.isend(tensor, to, group=group)

    def all_reduce(self, tensor: Tensor, group: Any, async_op: bool) -> Any:
        """See `_Transport`."""
        return _Over() if isinstance(group, _Silence) else dist.all_reduce(tensor, group=group, async_op=async_op)


class _Silent(Groups):
    def get(self, ranks: tuple[int, ...], purpose: str = "") -> Any:
        """See `Groups`."""
        return _Silence()


def silent(rank: int, world: int, *, plan: Plan) -> Step:
    """All that a rank computes, copies and adds in a step, without waiting for anybody: the no-communication ceiling.

    Zeros arrive, so the loss says nothing; the learning rate is 0.
    """
    for module in (collectives, line):
        if module.dist is dist:
            module.dist = _Transport()  # type: ignore[assignment]
    mesh = Mesh(plan.topology, torch.device("cpu"), groups=_Silent(), rank=rank)
    runtime = compose(plan, mesh)
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, 0)
    scale = torch.full((), 1.0 / plan.tokens_per_step, dtype=torch.float64)

    def step(index: int) -> float:
        batch = rank_batch(runtime, samples, index)
        loss = runtime.pipeline.run(to_device(batch, plan.spec.train.micro_batch_size, mesh.device), scale)
        runtime.states.collect_gradients()
        runtime.states.squared_norm().item()
        runtime.states.update(optimizer, 0.0, 0.5)
        return float(loss)

    return step
