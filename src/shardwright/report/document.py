"""A plan as one JSON document."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from shardwright.cost.hardware import Hardware
from shardwright.plan.communication import most_by_group
from shardwright.plan.fit import Fit, fullest, fullest_by_stage
from shardwright.plan.flops import flops_of
from shardwright.plan.pipeline import bubble_in_units, totals_of
from shardwright.plan.plan import Plan
from shardwright.report.pipeline import rank_rows, stage_rows


def document(
    plan: Plan, hardware: Hardware | None = None, fit: Fit | None = None, ranks_per_node: int | None = None
) -> dict[str, Any]:
    """A plan, its pipeline, memory, communication and FLOPs; `hardware` and `fit` are null where no device was named.

    Actions are summed up by rank: a step may have 10^5 of them.
    """
    return {
        "plan": plan.model_dump(mode="json"),
        "stages": [asdict(row) for row in stage_rows(plan)],
        "schedule": {
            "name": plan.spec.parallel.pipeline_schedule,
            "ranks": plan.topology.pp,
            "virtual_stages": plan.virtual_stages,
            "microbatches": plan.num_microbatches,
        },
        "ranks": [asdict(row) for row in rank_rows(plan)],
        "bubble": totals_of(plan).bubble,
        "bubble_of_equal_stages": bubble_in_units(plan),
        "memory": _memory(plan),
        "hardware": asdict(hardware) if hardware else None,
        "fit": {**asdict(fit), "fits": fit.fits} if fit else None,
        "communication": [asdict(share) for share in most_by_group(plan, ranks_per_node)],
        "flops": _flops(plan),
    }


def _memory(plan: Plan) -> dict[str, Any]:
    """The fullest rank at each place of the pipeline, and the fullest of these."""
    records = fullest_by_stage(plan)
    return {"fullest_rank": fullest(records).rank, "by_pipeline_rank": [record.as_json() for record in records]}


def _flops(plan: Plan) -> dict[str, Any]:
    flops = flops_of(plan)
    steps = {"model_per_step": flops.model_per_step, "hardware_per_step": flops.hardware_per_step}
    return {**asdict(flops), **steps, "hardware_per_device": flops.hardware_per_device}
