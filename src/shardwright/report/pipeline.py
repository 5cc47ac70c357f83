"""A plan's pipeline in rows: what each stage is, what each rank of the pipeline does and holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

from shardwright.cost.compute import total
from shardwright.plan.memory import parameters_of_stage
from shardwright.plan.pipeline import computing_schedule_of, placement_of, stage_costs, totals_of
from shardwright.plan.plan import Plan
from shardwright.schedule.simulate import live_microbatches


@dataclass(frozen=True)
class StageRow:
    """One stage: its place, its layers from `first_layer` to `last_layer`, and its share of the cost of all stages."""

    stage: int
    rank: int
    first_layer: int
    last_layer: int
    embedding: bool
    head: bool
    cost_share: float
    parameters: int


@dataclass(frozen=True)
class RankRow:
    """One rank of the pipeline in a step, by estimated costs; times are shares of the step's.

    `live_microbatches` counts at the peak, once for each stage of the rank that keeps one.
    """

    rank: int
    stages: list[int]
    begins: float
    ends: float
    busy: float
    actions: dict[str, int]
    live_microbatches: int


def stage_rows(plan: Plan) -> list[StageRow]:
    """The stages in the order of the model."""
    costs = [total(cost) for cost in stage_costs(plan)]
    ends = list(accumulate(plan.layers_per_stage))
    placed, last = placement_of(plan), len(costs) - 1
    return [
        StageRow(
            stage=stage,
            rank=placed[stage],
            first_layer=ends[stage] - layers,
            last_layer=ends[stage] - 1,
            embedding=stage == 0,
            head=stage == last,
            cost_share=costs[stage] / sum(costs),
            parameters=parameters_of_stage(plan, stage),
        )
        for stage, layers in enumerate(plan.layers_per_stage)
    ]


def rank_rows(plan: Plan) -> list[RankRow]:
    """The ranks of the pipeline."""
    placed, schedule, totals = placement_of(plan), computing_schedule_of(plan), totals_of(plan)
    live = live_microbatches(schedule).per_rank
    return [
        RankRow(
            rank=rank,
            stages=[stage for stage, of in enumerate(placed) if of == rank],
            begins=totals.begins[rank] / totals.makespan,
            ends=totals.ends[rank] / totals.makespan,
            busy=totals.busy[rank] / totals.makespan,
            actions={str(kind): count for kind, count in Counter(action.kind for action in actions).items()},
            live_microbatches=live[rank],
        )
        for rank, actions in enumerate(schedule.actions)
    ]
