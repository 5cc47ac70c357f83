"""One row of a comparison: what its ranks told, summed up beside what was planned."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from shardwright.plan.communication import GROUPS, group_of
from shardwright.plan.pipeline import totals_of
from shardwright.plan.plan import Plan
from shardwright.plan.timeline import pipeline_times
from shardwright.record.store import read_json
from shardwright.record.timeline import TimelineRecord
from shardwright.verify.proof import prove
from shardwright.verify.trace import read_traces

_ONCE = ("loss/count", "health")


def row_of(plan: Plan, proof: Plan, folder: Path, proven: int) -> dict[str, Any]:
    """The measured part of a row; `folder` holds what the ranks wrote. Times are the medians over the timed steps."""
    ranks = [read_json(folder / f"{rank}.json") for rank in range(plan.world_size)]
    seconds = statistics.median(max(rank["seconds"][i] for rank in ranks) for i in range(len(ranks[0]["seconds"])))
    worst = max(ranks, key=lambda rank: rank["memory"]["measured"]["peak"] or rank["memory"]["measured"]["total"])
    busiest = max(ranks, key=lambda rank: _sent(rank["communication"]["measured"]))
    return {
        "ranks": plan.world_size,
        "seconds": seconds,
        "tokens_per_second": plan.tokens_per_step / seconds,
        "losses": ranks[0]["losses"],
        "memory": {
            "worst_rank": worst["rank"],
            **worst["memory"],
            "by_rank": [rank["memory"] for rank in ranks],
        },
        "communication": {
            "busiest_rank": busiest["rank"],
            "by_reason": {key: busiest["communication"][key] for key in ("estimated", "measured")},
            "by_group": {key: _by_group(busiest["communication"][key]) for key in ("estimated", "measured")},
            "sent": {key: _sent(busiest["communication"][key]) for key in ("estimated", "measured")},
            "exact": all(rank["communication"]["estimated"] == rank["communication"]["measured"] for rank in ranks),
            "collectives_per_layer": _collectives(busiest["communication"]["measured"]) / _layers(plan),
        },
        "bubble": _bubble(plan, ranks),
        "proof": _proof(proof, folder / "proof", proven),
    }


def _sent(rows: list[dict[str, Any]]) -> int:
    return sum(row["sent_bytes"] for row in rows)


def _by_group(rows: list[dict[str, Any]]) -> dict[str, int]:
    sums: dict[str, int] = dict.fromkeys(GROUPS, 0)
    for row in rows:
        sums[group_of(row["reason"])] += row["sent_bytes"]
    return {group: size for group, size in sums.items() if size}


def _collectives(rows: list[dict[str, Any]]) -> int:
    """Calls of a step, without the two that a step makes whatever its layers."""
    return sum(row["calls"] for row in rows if row["reason"] not in _ONCE)


def _layers(plan: Plan) -> float:
    return plan.architecture.layers / plan.topology.pp


def _bubble(plan: Plan, ranks: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Shares of the pipeline's time; None without a pipeline."""
    if plan.topology.pp == 1:
        return None
    times = pipeline_times(
        plan, {rank["rank"]: TimelineRecord.from_json(rank["timeline"], rank["rank"]) for rank in ranks}
    )
    return {
        "planned": totals_of(plan).bubble,
        "measured": times.bubble,
        "makespan": times.makespan,
        "replayed_makespan": times.replayed,
    }


def _proof(plan: Plan, folder: Path, steps: int) -> dict[str, Any]:
    found = prove(plan, read_traces(folder, plan.world_size), steps)
    return {"passed": found.passed, "bar": max(found.bars.values()), **found.comparison.errors()}
