"""The pipeline of a plan: where its stages lie, what they cost, what its ranks do in which order, and how long."""

from __future__ import annotations

from functools import lru_cache

from shardwright.cost.compute import model_cost
from shardwright.plan.plan import Plan
from shardwright.schedule.action import Schedule, StageCost
from shardwright.schedule.bounds import closed_form_makespan, ideal_bubble
from shardwright.schedule.build import build, placement
from shardwright.schedule.simulate import Timeline, Totals, simulate, simulated_totals
from shardwright.schedule.transfers import with_transfers


def placement_of(plan: Plan) -> tuple[int, ...]:
    """The pipeline rank of each stage, in the order of the model."""
    return placement(plan.spec.parallel.pipeline_schedule, plan.topology.pp, plan.virtual_stages)


def stage_costs(plan: Plan) -> tuple[StageCost, ...]:
    """FLOPs of F, I and W of one microbatch on each stage, over all of `tp`."""
    tokens = plan.spec.train.micro_batch_size * plan.sequence_length
    return model_cost(plan.architecture, plan.sequence_length, tokens).stages(plan.layers_per_stage)


def schedule_of(plan: Plan, num_microbatches: int | None = None) -> Schedule:
    """What each rank of the pipeline does, transfers included, for a step's microbatches or for so many."""
    return _with_transfers(*_key(plan, num_microbatches or plan.num_microbatches), stage_costs(plan))


def computing_schedule_of(plan: Plan) -> Schedule:
    """The same without transfers: for large pipelines these take long to place."""
    return _computing(*_key(plan, plan.num_microbatches))


def totals_of(plan: Plan) -> Totals:
    """When each rank of the pipeline begins, works and ends in a step, by estimated costs; transfers take no time."""
    return _totals(*_key(plan, plan.num_microbatches), stage_costs(plan))


def beginning_in_units(plan: Plan, until: float) -> Timeline:
    """What begins before `until`, if F, I and W take one unit of time on every stage."""
    return simulate(computing_schedule_of(plan), until=until)


def makespan_in_units(plan: Plan) -> int:
    """How many such units the whole step takes, in closed form."""
    return closed_form_makespan(*_key(plan, plan.num_microbatches))


def bubble_in_units(plan: Plan) -> float:
    """The bubble of equal stages, in closed form."""
    return ideal_bubble(*_key(plan, plan.num_microbatches))


def _key(plan: Plan, num_microbatches: int) -> tuple[str, int, int, int]:
    return plan.spec.parallel.pipeline_schedule, plan.topology.pp, plan.virtual_stages, num_microbatches


@lru_cache(maxsize=16)
def _computing(name: str, num_ranks: int, virtual_stages: int, num_microbatches: int) -> Schedule:
    return build(name, num_ranks, virtual_stages, num_microbatches)


@lru_cache(maxsize=16)
def _with_transfers(
    name: str, num_ranks: int, virtual_stages: int, num_microbatches: int, costs: tuple[StageCost, ...]
) -> Schedule:
    return with_transfers(_computing(name, num_ranks, virtual_stages, num_microbatches), costs)


@lru_cache(maxsize=16)
def _totals(
    name: str, num_ranks: int, virtual_stages: int, num_microbatches: int, costs: tuple[StageCost, ...]
) -> Totals:
    return simulated_totals(_computing(name, num_ranks, virtual_stages, num_microbatches), costs)
