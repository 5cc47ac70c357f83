"""Shardwright's side of a race, and its ceiling: the same step with transfers that take no time."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend "fake"

from benchmarks.harness import Step
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


class _Silent(Groups):
    """Groups of torch's fake backend, for which every transfer is over when it begins."""

    def get(self, ranks: tuple[int, ...], purpose: str = "") -> dist.ProcessGroup:
        """See `Groups`."""
        if (ranks, purpose) not in self._made:
            group = dist.new_group(list(ranks), backend="fake", use_local_synchronization=True)
            assert isinstance(group, dist.ProcessGroup)
            self._made[ranks, purpose] = group
        return self._made[ranks, purpose]


def silent(rank: int, world: int, *, plan: Plan) -> Step:
    """All that a rank computes, copies and adds in a step, without waiting for anybody: the no-communication ceiling.

    What would be received is whatever was in the memory, so the learning rate is 0 and the loss says nothing.
    """
    mesh = Mesh(plan.topology, torch.device("cpu"), groups=_Silent(), rank=rank)
    runtime = compose(plan, mesh)
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, 0)
    scale = torch.full((), 1.0 / (plan.spec.train.global_batch_size * plan.sequence_length), dtype=torch.float64)

    def step(index: int) -> float:
        batch = rank_batch(runtime, samples, index)
        loss = runtime.pipeline.run(to_device(batch, plan.spec.train.micro_batch_size, mesh.device), scale)
        runtime.states.collect_gradients()
        runtime.states.squared_norm().item()
        runtime.states.update(optimizer, 0.0, 0.5)
        return float(loss)

    return step
