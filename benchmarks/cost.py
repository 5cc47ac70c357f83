"""What recomputation and offload cost in time, and what they save: the 25 M-parameter model on 2 ranks, fp32.

    python -m benchmarks.cost [--rounds 7] [--steps 1] [--clock wall | cpu] [--only CASE ...] [--record]

Each setting takes its turn beside the same layout without it. A step trains 4 sequences of 512 tokens, as one
microbatch of every rank. Beside the measured time stands what matrix products alone predict: full recomputation
repeats a layer's forward up to its last product, selective repeats no product, and offload moves bytes. Memory is
counted apart, in a step of its own: live tensors on the worst rank. The peer is a plain Llama under DDP without and
with `torch.utils.checkpoint` around each layer. The update of offload "update" is awaited at the end of a round, so
that it does not run in another case's time; within one it overlaps the next step's forward.

`--clock cpu` takes the first rank's own processor time, all threads, instead of time on the wall: without what waiting
costs, and less distorted by neighbours on a busy machine.

FSDP2's CPUOffloadPolicy runs over gloo on CPUs, but moves nothing there: its device is the host. It is not a peer here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.harness import (
    COMPARED,
    RECORDS,
    Case,
    Result,
    Step,
    against,
    check_losses,
    environment,
    quartiles,
    race,
)
from benchmarks.memory import measure
from benchmarks.peers.ddp import ddp
from benchmarks.peers.plain import CheckpointedLlama
from shardwright.comm.mesh import Mesh
from shardwright.cost.compute import model_cost, total
from shardwright.data.samples import RandomSamples
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import compose
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.record.records import MemoryRecord
from shardwright.spec.load import build
from shardwright.train.batches import rank_batch
from shardwright.train.step import train_step

SEQUENCES, LENGTH, WORLD = 4, 512, 2
PRECISION = "fp32 / fp32 / fp32 / -"
MB = 1e6
DATA, TENSOR, TORCH = "dp 2, zero 1", "tp 2", "torch DDP"


@dataclass(frozen=True)
class Setting:
    """A layout, what is asked of [memory], and the name of the case that it is compared with."""

    name: str
    parallel: dict[str, int]
    memory: dict[str, str]
    beside: str

    @property
    def plan(self) -> Plan:
        """The 25 M-parameter model under this setting."""
        train = {
            "sequence_length": LENGTH,
            "global_batch_size": SEQUENCES,
            "micro_batch_size": SEQUENCES // self.parallel["dp"],
            "lr": 1e-3,
            "dtype": "fp32",
        }
        tables = {"model": {"preset": "small-25m"}, "train": train, "parallel": self.parallel, "memory": self.memory}
        return resolve(build(tables), world_size=WORLD, device="cpu", native_bf16=False, tokenizer_vocab=None)


def settings() -> list[Setting]:
    """Ours, each layout without anything first."""
    data, tensor = {"dp": WORLD, "zero": 1}, {"dp": 1, "tp": WORLD, "zero": 0}
    found = []
    for layout, parallel in ((DATA, data), (TENSOR, tensor)):
        asked = [{}, {"recompute": "selective"}, {"recompute": "full"}]
        asked += [{"offload": "state"}, {"offload": "update"}] if parallel is data else []
        for memory in asked:
            name = ", ".join([layout, *(f"{key} {value}" for key, value in memory.items())])
            found.append(Setting(name, parallel, memory, layout if memory else ""))
    return found


def shardwright(rank: int, world: int, *, plan: Plan, steps: int) -> Step:
    """Shardwright's own training step; after the last of a round no update is under way."""
    runtime = compose(plan, Mesh(plan.topology, torch.device("cpu")))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    samples = RandomSamples(plan.architecture.vocab, LENGTH, 0)

    def step(index: int) -> float:
        loss = train_step(runtime, optimizer, rank_batch(runtime, samples, index), 1e-3).loss
        if (index + 1 - COMPARED) % steps == 0:
            runtime.states.owned_tensors()
        return loss

    return step


def on_processor(rank: int, world: int, *, make: Callable[[int, int], Step]) -> Step:
    """A step that returns the processor time it took this rank."""
    step = make(rank, world)

    def timed(index: int) -> float:
        began = time.process_time()
        step(index)
        return time.process_time() - began

    return timed


def cases(steps: int, clock: str) -> list[Case]:
    """The peer without and with checkpoints, and ours."""
    plan = settings()[0].plan  # for the peer: sizes and initial values
    peers = [
        Case(TORCH, PRECISION, partial(ddp, plan=plan, dtype="fp32")),
        Case(
            f"{TORCH}, checkpoint", PRECISION, partial(ddp, plan=plan, dtype="fp32", kind=CheckpointedLlama), (TORCH,)
        ),
    ]
    own = [
        Case(s.name, PRECISION, partial(shardwright, plan=s.plan, steps=steps), (s.beside,), batch=True)
        for s in settings()
    ]
    found = [*peers, *own]
    if clock == "wall":
        return found
    return [replace(case, make=partial(on_processor, make=case.make), bound=True, modelled=True) for case in found]


def predicted(plan: Plan, recompute: str) -> float:
    """How many times the FLOPs of no recomputation a setting's matrix products and attention have."""
    a, tokens = plan.architecture, SEQUENCES * LENGTH
    cost = model_cost(a, LENGTH, tokens)
    whole = total(cost.embedding) + a.layers * total(cost.layer) + total(cost.head)
    last_product = 2.0 * a.ffn * a.hidden * tokens  # no backward needs what it gives
    repeated = a.layers * (cost.layer.forward - last_product) if recompute == "full" else 0.0
    return 1 + repeated / whole


def moved(record: MemoryRecord, form: str) -> int:
    """Bytes between host and device in a step of fp32 AdamW: what `state` keeps goes in and comes out; of what `update`
    keeps, masters, two moments and landed gradients, the gradients come and the new values go."""
    return {"none": 0, "state": 2 * record.host, "update": record.host // 2}[form]


@dataclass(frozen=True)
class Row:
    """A case's times, what FLOPs predict, and the worst rank's memory; None for peers, not counted."""

    result: Result
    predicted: float
    moved: int = 0
    memory: MemoryRecord | None = None

    def cells(self, results: Sequence[Result]) -> list[str]:
        """Its cells of the table."""
        low, middle, high = (f"{1e3 * value:.0f}" for value in quartiles(self.result.seconds))
        none = next((other for other in results if other.name in self.result.peers), None)
        low_ratio, ratio, high_ratio = against(none, self.result) if none else (1.0, 1.0, 1.0)
        beside = f"**{ratio:.2f}** ({low_ratio:.2f} to {high_ratio:.2f}) x {none.name}" if none else ""
        cells = [self.result.name, f"{middle} ({low} to {high})", beside, f"{self.predicted:.2f}" if none else ""]
        if self.memory is None:
            return [*cells, "", "", "", ""]
        sizes = (self.memory.activations, self.memory.peak, self.memory.host, self.moved)
        return [*cells, *(f"{size / MB:.0f}" for size in sizes)]


def rows_of(results: Sequence[Result]) -> list[Row]:
    """Times beside predictions and measured memory."""
    named = {setting.name: setting for setting in settings()}
    chosen = [named[result.name] for result in results if result.name in named]
    measured = {
        setting.name: max((pair.measured for pair in pairs), key=lambda record: record.peak)
        for setting, pairs in zip(chosen, measure([setting.plan for setting in chosen]), strict=True)
    }
    rows = []
    for result in results:
        if result.name not in named:
            rows.append(Row(result, predicted(settings()[0].plan, "full" if result.peers else "none")))
            continue
        memory, plan = measured[result.name], named[result.name].plan
        spec = plan.spec.memory
        rows.append(Row(result, predicted(plan, spec.recompute), moved(memory, spec.offload), memory))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The trade as a Markdown table."""
    heads = ["case", "ms a step (quartiles)", "time", "by FLOPs", "activations, MB", "live, MB", "host, MB"]
    lines = ["| " + " | ".join([*heads, "moved a step, MB"]) + " |", "|" + "---|" * (len(heads) + 1)]
    results = [row.result for row in rows]
    return "\n".join([*lines, *("| " + " | ".join(row.cells(results)) + " |" for row in rows)])


def main() -> None:
    """Run the race, count memory, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="steps a case takes in each round")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="cases whose names hold one of these")
    parser.add_argument("--record", action="store_true", help=f"write {RECORDS}/cost_fp32*")
    arguments = parser.parse_args()
    if arguments.record and arguments.only:
        parser.error("--record is for all cases: leave out --only")
    rounds, steps, clock = arguments.rounds, arguments.steps, arguments.clock
    chosen = [c for c in cases(steps, clock) if not arguments.only or any(p in c.name for p in arguments.only)]
    results = race(chosen, world=WORLD, rounds=rounds, steps=steps)
    print(f"{'processor time' if clock == 'cpu' else check_losses(results, 1e-3)}\n", flush=True)
    rows = rows_of(results)
    print(table(rows))
    if arguments.record:
        _write(f"python -m benchmarks.cost --rounds {rounds} --steps {steps} --clock {clock} --record", clock, rows)


def _write(command: str, clock: str, rows: Sequence[Row]) -> None:
    content: dict[str, Any] = {"command": command, "date": time.strftime("%Y-%m-%d"), "environment": environment(WORLD)}
    content["tokens_per_step"] = SEQUENCES * LENGTH
    content["rows"] = [
        {
            **asdict(row.result),
            "predicted": row.predicted,
            "moved": row.moved,
            "memory": row.memory.as_json() if row.memory else None,
        }
        for row in rows
    ]
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / ("cost_fp32.json" if clock == "wall" else "cost_fp32_cpu.json")
    path.write_text(json.dumps(content, indent=1) + "\n")
    kind = "Time" if clock == "wall" else "Processor time of a rank"
    note = f"{kind} is the median, over rounds, of the ratio within a round; memory is live tensors on the worst rank."
    path.with_suffix(".md").write_text(f"`{command}`\n\n{note}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
