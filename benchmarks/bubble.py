"""How well the simulator knows the executor: a step's pipeline as measured, beside the schedule replayed.

    python -m benchmarks.bubble [--rounds 5] [--shared] [--record]

Two stages, a core each: the 25 M-parameter model's actions compute, and the schedule is replayed with each action's
measured duration. Four stages: actions take fixed times, which they sleep, so that the executor's order is measured and
not the cores; they stand beside the simulation of those times. With --shared also four stages that compute, two to a
core: how much they wait for each other is printed, not compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RECORDS, environment
from shardwright.comm.job import Job
from shardwright.comm.launch import launch
from shardwright.comm.mesh import Mesh
from shardwright.comm.worker import Worker
from shardwright.data.samples import RandomSamples
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel import pipeline
from shardwright.parallel.compose import compose
from shardwright.plan.pipeline import computing_schedule_of, totals_of
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.plan.timeline import pipeline_times
from shardwright.record.store import read_json, write_json
from shardwright.record.timeline import TimelineRecord
from shardwright.schedule.action import StageCost
from shardwright.schedule.simulate import simulate
from shardwright.spec.load import build
from shardwright.train.batches import rank_batch
from shardwright.train.step import train_step
from shardwright.train.timeline import StepTimeline

SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb-h1": 1, "zbv": 2}
FIXED = StageCost(forward=0.08, input=0.08, weight=0.06)
"""Seconds. Between two actions a rank takes about 2 ms where four share two cores: of 40 ms that would be 5 %."""

TINY = {"layers": 8, "hidden": 16, "heads": 2, "ffn": 32, "vocab": 64}


def plan_of(schedule: str, ranks: int, model: dict[str, Any], length: int) -> Plan:
    """Eight microbatches of one sequence."""
    tables = {
        "model": model,
        "train": {"sequence_length": length, "global_batch_size": 8, "micro_batch_size": 1, "dtype": "fp32"},
        "parallel": {
            "pp": ranks,
            "dp": 1,
            "zero": 0,
            "pipeline_schedule": schedule,
            "virtual_stages": SCHEDULES[schedule],
        },
    }
    return resolve(build(tables), world_size=ranks, device="cpu", native_bf16=False, tokenizer_vocab=None)


@contextmanager
def fixed_times(cost: StageCost) -> Iterator[None]:
    """Every action that computes lasts as long as `cost` says, from the moment at which its input is there."""
    since = [0.0]
    arrived, own = pipeline._arrived, {}

    def arriving(item: Any) -> Any:
        tensor = arrived(item)
        since[0] = time.perf_counter()
        return tensor

    def lasting(method: Callable[..., None], seconds: float) -> Callable[..., None]:
        def perform(*arguments: Any) -> None:
            since[0] = time.perf_counter()
            method(*arguments)
            time.sleep(max(0.0, since[0] + seconds - time.perf_counter()))

        return perform

    names = {"_forward": cost.forward, "_backward": cost.input + cost.weight}
    names |= {"_input_gradient": cost.input, "_weight_gradient": cost.weight}
    pipeline._arrived = arriving
    for name, seconds in names.items():
        own[name] = getattr(pipeline.Execution, name)
        setattr(pipeline.Execution, name, lasting(own[name], seconds))
    try:
        yield
    finally:
        pipeline._arrived = arrived
        for name, method in own.items():
            setattr(pipeline.Execution, name, method)


def timeline_of(plan: Plan, mesh: Mesh, fixed: StageCost | None = None, steps: int = 1) -> list[dict[str, Any]]:
    """In a rank: the timelines of some steps, after one that is not looked at."""
    runtime = compose(plan, mesh)
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, 0)
    train_step(runtime, optimizer, rank_batch(runtime, samples, 0), 1e-3)
    found = []
    for step in range(1, steps + 1):
        with fixed_times(fixed) if fixed else nullcontext(), StepTimeline(mesh, step) as timeline:
            train_step(runtime, optimizer, rank_batch(runtime, samples, step), 1e-3)
        assert timeline.record is not None
        found.append(timeline.record.as_json())
    runtime.states.finish()
    return found


def main(worker: Worker, arguments: tuple[str, ...]) -> None:
    """`arguments`: a folder with a plan.json, how many steps, whether actions sleep."""
    folder, steps, sleeps = Path(arguments[0]), int(arguments[1]), arguments[2] == "sleep"
    torch.set_num_threads(1)
    plan = Plan.model_validate(read_json(folder / "plan.json"))
    mesh = worker.mesh(plan.topology)
    write_json(folder / f"{mesh.rank}.json", timeline_of(plan, mesh, FIXED if sleeps else None, steps))


def measured(plan: Plan, steps: int, *, sleeps: bool) -> list[dict[int, TimelineRecord]]:
    """The timelines of all ranks, step by step."""
    with tempfile.TemporaryDirectory(prefix="shardwright-bubble-") as temporary:
        folder = Path(temporary)
        write_json(folder / "plan.json", plan.model_dump(mode="json"))
        arguments = (temporary, str(steps), "sleep" if sleeps else "compute")
        if code := launch(Job(plan.world_size, "benchmarks.bubble", arguments)):
            raise SystemExit(code)
        ranks = [read_json(folder / f"{rank}.json") for rank in range(plan.world_size)]
    return [{r: TimelineRecord.from_json(own[step], r) for r, own in enumerate(ranks)} for step in range(steps)]


def row(schedule: str, ranks: int, rounds: int, *, sleeps: bool) -> dict[str, Any]:
    """One line of the table: medians over the steps."""
    model, length = (TINY, 8) if sleeps else ({"preset": "small-25m"}, 512)
    plan = plan_of(schedule, ranks, model, length)
    times = [pipeline_times(plan, records) for records in measured(plan, rounds, sleeps=sleeps)]
    simulated = [t.replayed for t in times]
    if sleeps:
        costs = [FIXED] * len(plan.layers_per_stage)
        simulated = [simulate(computing_schedule_of(plan), costs).makespan] * rounds
    errors = [ours / t.makespan - 1 for ours, t in zip(simulated, times, strict=True)]
    return {
        "schedule": schedule,
        "stages": len(plan.layers_per_stage),
        "ranks": ranks,
        "sleeps": sleeps,
        "measured": statistics.median(t.makespan for t in times),
        "simulated": statistics.median(simulated),
        "error": statistics.median(errors),
        "bubble": statistics.median(t.bubble for t in times),
        "planned_bubble": totals_of(plan).bubble,
    }


def told(rows: list[dict[str, Any]]) -> str:
    """The record for people."""
    lines = ["| schedule | ranks, stages | actions | measured | simulated | error | bubble | planned by FLOPs |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in rows:
        shares = "" if r["ranks"] > 2 and not r["sleeps"] else f"**{r['error']:+.1%}**"
        actions = "sleep" if r["sleeps"] else "compute, a core each" if r["ranks"] == 2 else "compute, two to a core"
        lines.append(
            f"| {r['schedule']} | {r['ranks']}, {r['stages']} | {actions} | {r['measured'] * 1e3:,.0f} ms | "
            f"{r['simulated'] * 1e3:,.0f} ms | {shares} | {r['bubble']:.0%} | {r['planned_bubble']:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shared", action="store_true", help="four stages that compute on two cores, too")
    parser.add_argument("--record", action="store_true", help=f"write {RECORDS}/bubble.*")
    asked = parser.parse_args()
    kinds = [(2, False), (4, True)] + [(4, False)] * asked.shared
    table = [row(s, n, asked.rounds, sleeps=sleeps) for n, sleeps in kinds for s in SCHEDULES]
    print(told(table))
    if asked.record:
        (RECORDS / "bubble.json").write_text(
            json.dumps({"environment": environment(4), "rows": table}, indent=1) + "\n"
        )
        command = f"python -m benchmarks.bubble --rounds {asked.rounds}" + " --shared" * asked.shared
        (RECORDS / "bubble.md").write_text(f"`{command}`, {environment(4)['cpu']}, 2 cores\n\n{told(table)}\n")
    sys.exit(0)
