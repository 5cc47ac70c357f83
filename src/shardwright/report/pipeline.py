"""A plan's pipeline in rows: what each stage is, what each rank of the pipeline does and holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from shardwright.cost.compute import total
from shardwright.layout.mesh import Coordinate
from shardwright.plan.memory import estimated_memory, parameters_of_stage
from shardwright.plan.pipeline import placement_of, stage_costs, timeline_in_units, timeline_of
from shardwright.plan.plan import Plan
from shardwright.schedule.simulate import Timeline


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

    `live_microbatches` counts at the peak, once for each stage of the rank that keeps one. `state_bytes` is the
    training state of the fullest of its ranks along `tp`.
    """

    rank: int
    stages: list[int]
    begins: float
    ends: float
    busy: float
    actions: dict[str, int]
    live_microbatches: int
    state_bytes: int


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


def rank_rows(plan: Plan, timeline: Timeline) -> list[RankRow]:
    """The ranks of the pipeline."""
    placed, live = placement_of(plan), timeline.live_microbatches.per_rank
    return [
        RankRow(
            rank=rank,
            stages=[stage for stage, of in enumerate(placed) if of == rank],
            begins=spans[0].begin / timeline.makespan,
            ends=spans[-1].end / timeline.makespan,
            busy=timeline.busy[rank] / timeline.makespan,
            actions=dict(Counter(str(span.action.kind) for span in spans)),
            live_microbatches=live[rank],
            state_bytes=_state_bytes(plan, rank),
        )
        for rank, spans in enumerate(timeline.spans)
    ]


def _state_bytes(plan: Plan, pipeline_rank: int) -> int:
    ranks = [plan.topology.rank(Coordinate(pp=pipeline_rank, tp=index)) for index in range(plan.topology.tp)]
    return max(estimated_memory(plan, rank).total for rank in ranks)


def document(plan: Plan) -> dict[str, Any]:
    """A plan and its pipeline as one JSON document. Actions are summed up by rank: a step may have 10^5 of them."""
    timeline = timeline_of(plan)
    return {
        "plan": plan.model_dump(mode="json"),
        "stages": [asdict(row) for row in stage_rows(plan)],
        "schedule": {
            "name": plan.spec.parallel.pipeline_schedule,
            "ranks": plan.topology.pp,
            "virtual_stages": plan.virtual_stages,
            "microbatches": plan.num_microbatches,
        },
        "ranks": [asdict(row) for row in rank_rows(plan, timeline)],
        "bubble": timeline.bubble,
        "bubble_of_equal_stages": timeline_in_units(plan).bubble,
    }
