"""A run directory made without a run: plan, steps and ledgers of a layout, its timeline as the schedule says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from shardwright.plan.communication import estimated_communication
from shardwright.plan.memory import estimated_memory
from shardwright.plan.pipeline import schedule_of, stage_costs
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.record.records import Origin
from shardwright.schedule.simulate import simulate
from shardwright.spec.load import load

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
STEP = 0.4
"""Seconds of the pipeline's part of the recorded step."""

TRANSFER = 2e-5
"""Seconds that each transfer takes on its rank."""


def make_run(path: Path, steps: int, *overrides: str, ranks: bool = True) -> Plan:
    """Writes the directory. With `ranks=False` nothing is measured but the steps."""
    spec = load(RECIPE, [*overrides, f"train.steps={max(1, steps)}"])
    plan = resolve(spec, world_size=None, device="cpu", native_bf16=True, tokenizer_vocab=spec.data.expected_vocab)
    (path / "ranks").mkdir(parents=True)
    (path / "plan.json").write_text(json.dumps(plan.model_dump(mode="json")))
    (path / "steps.jsonl").write_text("".join(json.dumps(_step(step)) + "\n" for step in range(1, steps + 1)))
    validated = [{"step": s, "loss": _loss(s) + 0.1, "num_targets": 9, "seconds": 0.1} for s in range(0, steps + 1, 10)]
    (path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in validated))
    saved = {"step": steps, "bytes": 3 << 20, "stall": 0.002, "seconds": 0.5}
    (path / "checkpoints.jsonl").write_text(json.dumps(saved) + "\n")
    if ranks:
        spans = _timelines(plan)
        for rank in range(plan.world_size):
            place = plan.topology.coordinate(rank).pp
            (path / "ranks" / f"{rank}.json").write_text(json.dumps(_ledger(plan, rank, steps, spans[place])))
    return plan


def _loss(step: int) -> float:
    return 1.2 + 4 * math.exp(-step / 900) + 0.05 * math.sin(step)


def _step(step: int) -> dict[str, Any]:
    rate = 33_000 + 500 * math.sin(step)
    return {
        "step": step,
        "loss": _loss(step) if step % 50 else None,  # as a step that was skipped
        "grad_norm": 0.4 + math.exp(-step / 400),
        "lr": 1e-3,
        "num_tokens": 16384,
        "num_targets": 16384,
        "seconds": 16384 / rate,
        "tokens_per_second": rate,
        "mfu": "unknown",
        "applied": step % 50 != 0,
    }


def _timelines(plan: Plan) -> list[list[list[Any]]]:
    """Of each rank of the pipeline the segments: it waits in an action until its time has come."""
    schedule = schedule_of(plan)
    timeline = simulate(schedule, stage_costs(plan))
    scale, made = STEP / timeline.makespan, []
    for actions, spans in zip(schedule.actions, timeline.spans, strict=True):
        times = {span.action: (span.begin * scale + 0.004, span.end * scale + 0.004) for span in spans}
        now, segments = 0.004, [["step 6", 0.0, 0.004, 0.0]]
        for action in actions:
            begin, end = times.get(action, (now, now + TRANSFER))
            segments.append([action.in_words, now, max(end, now), max(0.0, min(begin, end) - now)])
            now = max(end, now)
        made.append([*segments, ["gradients", now, now + 0.01, 0.0], ["update", now + 0.01, now + 0.03, 0.0]])
    return made


def _ledger(plan: Plan, rank: int, steps: int, segments: list[list[Any]]) -> dict[str, Any]:
    estimated = estimated_memory(plan, rank).as_json()
    measured = {**estimated, "origin": Origin.MEASURED, "peak": estimated["peak"] + 1000 + rank}
    rows = [record.as_row() for record in estimated_communication(plan, rank)]
    sent = [{**row, "calls": int(row["calls"]) * steps, "sent_bytes": int(row["sent_bytes"]) * steps} for row in rows]
    return {
        "rank": rank,
        "coordinate": vars(plan.topology.coordinate(rank)),
        "memory": {"estimated": estimated, "measured": measured},
        "communication": {"steps": steps, "measured": sent, "estimated_per_step": rows},
        "timeline": {"step": 6, "segments": segments, "waits": [["all_gather over shard", 0.405, 0.41]]},
        "environment": {"torch": "2.13.0", "runs on": "a test"},
    }
