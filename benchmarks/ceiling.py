"""The bubble-limited ceiling of a pipeline: its step if results were with the next stage as soon as they are computed.

Both ranks at once compute their stage's actions in the order of the schedule, on made-up inputs, and send nothing. What
the actions took goes into the simulator; its makespan and the update's time are the ceiling. Stages, units and kernels
are the engine's own, so what a step takes beyond it is lost in transfers and in waiting for them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.autograd.graph import GradientEdge, get_gradient_edge

from benchmarks.harness import Step
from shardwright.comm.mesh import Mesh
from shardwright.data.samples import RandomSamples
from shardwright.optim.optimizers import AdamW, make_optimizer
from shardwright.parallel.compose import Runtime, compose
from shardwright.parallel.stage import Stage
from shardwright.parallel.zero.passage import Passage
from shardwright.plan.pipeline import schedule_of
from shardwright.plan.plan import Plan
from shardwright.schedule.action import Kind, StageCost
from shardwright.schedule.simulate import simulate


class Alone:
    """A rank's one stage, run without the others."""

    def __init__(self, runtime: Runtime, stage: Stage) -> None:
        self.runtime, self.stage = runtime, stage
        plan = runtime.plan
        size = plan.spec.train.micro_batch_size
        batch = RandomSamples(plan.architecture.vocab, plan.sequence_length, 0).at(range(size))
        self.tokens, self.targets = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
        made_up = torch.randn_like(runtime.pipeline.boundary.empty(self.tokens))
        self.input = self.tokens if stage.is_first else made_up
        self.gradient = torch.ones((), dtype=torch.float64) if stage.is_last else made_up * 1e-4
        self.kept: dict[int, tuple[Passage, GradientEdge]] = {}

    def forward(self, microbatch: int) -> None:
        """F, as the executor does it."""
        x = self.input.clone()
        x.requires_grad_(not self.stage.is_first)
        with self.runtime.states.forward(self.stage.number, stays=self.stage.is_last) as passage:
            y = self.stage(x, self.targets)
        if self.stage.is_last:
            y = y * torch.full((), 1.0 / self.runtime.plan.tokens_per_step, dtype=torch.float64)
        self.kept[microbatch] = passage, get_gradient_edge(y)

    def backward(self, microbatch: int) -> None:
        """B, as the executor does it."""
        passage, edge = self.kept.pop(microbatch)
        with self.runtime.states.backward(passage):
            torch.autograd.backward([edge], [self.gradient])


def _timed(what: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    what(*arguments)
    return time.perf_counter() - began


def _update(runtime: Runtime, optimizer: AdamW) -> None:
    """What follows the pipeline in a step; a learning rate of 0 keeps made-up gradients out of the parameters."""
    runtime.states.collect_gradients()
    runtime.states.squared_norm().item()
    runtime.states.update(optimizer, 0.0, 0.5)


def ceiling(rank: int, world: int, *, plan: Plan) -> Step:
    """A modelled step, for a plan whose schedule has one stage on each rank and does not split the backward."""
    runtime = compose(plan, Mesh(plan.topology, torch.device("cpu")))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    schedule = schedule_of(plan)
    (stage,) = runtime.pipeline.stages.values()
    alone = Alone(runtime, stage)
    perform = {Kind.FORWARD: alone.forward, Kind.BACKWARD: alone.backward}

    def step(_: int) -> float:
        spent: dict[Kind, list[float]] = {kind: [] for kind in perform}
        runtime.states.begin_step(plan.num_microbatches)
        for action in schedule.actions[rank]:
            if action.kind.computes:
                spent[action.kind].append(_timed(perform[action.kind], action.microbatch))
        update = _timed(_update, runtime, optimizer)
        rows = _gathered([*(statistics.mean(seconds) for seconds in spent.values()), update], world)
        costs = [StageCost(forward=forward, input=backward, weight=0.0) for forward, backward, _ in rows]
        return simulate(schedule, costs).makespan + max(row[-1] for row in rows)

    return step


def _gathered(mine: list[float], world: int) -> list[list[float]]:
    """Every rank's numbers, by rank."""
    rows = [torch.zeros(len(mine), dtype=torch.float64) for _ in range(world)]
    dist.all_gather(rows, torch.tensor(mine, dtype=torch.float64))
    return [row.tolist() for row in rows]
