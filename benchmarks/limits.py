"""The largest model that each technique fits under one cap in bytes per rank, estimated by the plan and confirmed.

    python -m benchmarks.limits [--only NAME ...] [--estimate] [--record]

The models of a family differ by their number of layers: these are added until the worst rank's estimated peak of live
bytes exceeds the cap. All techniques train the same global batch. bf16 with bf16 gradients, so that the seed's bytes
per parameter hold: 16, 4 + 12/N, 2 + 14/N, 16/N, and 4 on the device under offload. One family is small enough for
this machine: of it a step is run on each side of the line for some techniques. The largest model that fits must stay
under the cap when its live tensors are counted, and one layer more must not; the exit code is 1 if any does otherwise.
The other is of the size that GPUs train, by estimates alone. The bytes are those of the device column: on CPUs the host
of offload is the same memory, counted apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.harness import RECORDS, environment
from benchmarks.memory import Pair, measure
from shardwright.plan.memory import estimated_memory
from shardwright.plan.plan import Device, Plan
from shardwright.plan.resolve import resolve
from shardwright.record.records import MemoryRecord
from shardwright.spec.load import build
from shardwright.units import Bytes, parse_bytes


@dataclass(frozen=True)
class Family:
    """Models alike but for their number of layers, what they train on, and the cap on a rank's live bytes."""

    model: dict[str, Any]
    sequence_length: int
    global_batch_size: int
    cap: str
    device: Device

    @property
    def train(self) -> dict[str, Any]:
        """[train]: microbatches of one sequence, in bf16."""
        batch = {"global_batch_size": self.global_batch_size, "micro_batch_size": 1}
        return {"dtype": "bf16", "grad_dtype": "bf16", "sequence_length": self.sequence_length} | batch

    @property
    def told(self) -> str:
        """In words."""
        sizes = ", ".join(f"{name} {value}" for name, value in self.model.items())
        batch = f"{self.global_batch_size} sequences of {self.sequence_length} tokens a step, one a microbatch"
        return f"{self.cap} of live bytes a rank; layers of {sizes}; {batch}; bf16, bf16 gradients, AdamW."


SMALL = Family({"hidden": 64, "heads": 4, "vocab": 512}, 256, 8, "16 MiB", "cpu")
LARGE = Family({"hidden": 4096, "heads": 32, "kv_heads": 8, "vocab": 32000}, 4096, 8, "80 GB", "cuda")
INTERLEAVED = {"pipeline_schedule": "interleaved", "virtual_stages": 2}
MB, GB = 1e6, 1e9


@dataclass(frozen=True)
class Technique:
    """A name, [parallel] and [memory]; `confirmed`: a step is run on each side of the line."""

    name: str
    parallel: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    confirmed: bool = False

    def plan(self, family: Family, layers: int) -> Plan:
        """The plan of the family's model of so many layers."""
        tables = {
            "model": {"layers": layers} | family.model,
            "train": family.train,
            "parallel": {"dp": 1, "zero": 0} | self.parallel,
            "memory": self.memory,
        }
        return resolve(build(tables), world_size=None, device=family.device, native_bf16=True, tokenizer_vocab=None)

    @property
    def least(self) -> int:
        """The fewest layers: every stage has one."""
        return self.parallel.get("pp", 1) * self.parallel.get("virtual_stages", 1)


TECHNIQUES = (
    Technique("one rank", confirmed=True),
    Technique("data parallel, dp 2", {"dp": 2}),
    Technique("zero 1, dp 2", {"dp": 2, "zero": 1}),
    Technique("zero 1, dp 4", {"dp": 4, "zero": 1}),
    Technique("zero 2, dp 2", {"dp": 2, "zero": 2}),
    Technique("zero 2, dp 4", {"dp": 4, "zero": 2}),
    # With 4 ranks 2 microbatches are left for each, and the ledger, which reads what rests between a step's first two,
    # ends the reductions that the second would have met: the step's own peak is not seen.
    Technique("zero 3, dp 2", {"dp": 2, "zero": 3}, confirmed=True),
    Technique("zero 3, dp 4", {"dp": 4, "zero": 3}),
    Technique("tensor, tp 2", {"tp": 2}, confirmed=True),
    Technique("tensor, tp 4", {"tp": 4}),
    Technique("pipeline, pp 2, 1f1b", {"pp": 2}, confirmed=True),
    Technique("pipeline, pp 4, 1f1b", {"pp": 4}),
    Technique("pipeline, pp 2, interleaved", {"pp": 2} | INTERLEAVED),
    Technique("pipeline, pp 4, interleaved", {"pp": 4} | INTERLEAVED),
    Technique("recompute selective", memory={"recompute": "selective"}),
    Technique("recompute full", memory={"recompute": "full"}, confirmed=True),
    Technique("offload state", memory={"offload": "state"}, confirmed=True),
    Technique("offload update", memory={"offload": "update"}),
    Technique("zero 3, dp 4, recompute full", {"dp": 4, "zero": 3}, {"recompute": "full"}),
    Technique("3D, 2 x 2 x 2, zero 1", {"dp": 2, "tp": 2, "pp": 2, "zero": 1}),
    Technique(
        "3D, zero 3, offload state, recompute full",
        {"dp": 2, "tp": 2, "pp": 2, "zero": 3},
        {"offload": "state", "recompute": "full"},
    ),
)


@dataclass(frozen=True)
class Limit:
    """The most layers of a technique that fit, with the plan and the worst rank's estimate there and one layer on."""

    technique: Technique
    layers: int
    plans: tuple[Plan, Plan]
    estimates: tuple[MemoryRecord, MemoryRecord]

    @property
    def num_parameters(self) -> int:
        """Of the largest model that fits."""
        return self.plans[0].architecture.num_parameters


def worst(records: Sequence[MemoryRecord]) -> MemoryRecord:
    """The record of the rank whose peak is highest."""
    return max(records, key=lambda record: record.peak)


def estimate(plan: Plan) -> MemoryRecord:
    """What the plan says of its worst rank."""
    return worst([estimated_memory(plan, rank) for rank in range(plan.world_size)])


def most(fits: Callable[[int], bool], least: int) -> int:
    """The largest number that fits, from `least` on; least - 1 where none does.

    A layer more can leave the worst stage of a pipeline as it is, or shift the balance away from it, so numbers are
    tried as far beyond the line as there are stages.
    """
    low, high = least - 1, least
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    while further := [number for number in range(low + 1, low + 1 + least) if fits(number)]:
        low = further[-1]
    return low


def limit_of(technique: Technique, family: Family) -> Limit:
    """The line of a technique, by estimates alone."""
    cap = parse_bytes(family.cap)
    layers = most(lambda number: estimate(technique.plan(family, number)).peak <= cap, technique.least)
    if layers < technique.least:
        raise SystemExit(f"{technique.name}: not even {technique.least} layers fit under {family.cap}")
    plans = technique.plan(family, layers), technique.plan(family, layers + 1)
    return Limit(technique, layers, plans, (estimate(plans[0]), estimate(plans[1])))


@dataclass(frozen=True)
class Confirmation:
    """Both sides of a line as they ran: by rank, estimated and measured."""

    limit: Limit
    sides: tuple[list[Pair], list[Pair]]

    def measured(self, side: int) -> MemoryRecord:
        """The worst rank's record, under the line (0) or over it (1)."""
        return worst([pair.measured for pair in self.sides[side]])

    def holds(self, cap: Bytes) -> bool:
        """Whether the model that fits stayed under the cap, and the larger one did not."""
        return self.measured(0).peak <= cap < self.measured(1).peak


def confirm(limits: Sequence[Limit]) -> list[Confirmation]:
    """Run a step on each side of these lines."""
    ran = iter(measure([plan for limit in limits for plan in limit.plans]))
    return [Confirmation(limit, (next(ran), next(ran))) for limit in limits]


def limits_table(limits: Sequence[Limit], unit: float) -> str:
    """What fits, what the peak is made of there, and what offload keeps elsewhere; `unit` is MB or GB."""
    word = "MB" if unit == MB else "GB"
    heads = ["technique", "ranks", "layers", "parameters, M", "beside one rank"]
    heads += [f"{what}, {word}" for what in ("state", "activations", "peak", "host")]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    alone = limits[0].num_parameters
    for limit in limits:
        fitting = limit.estimates[0]
        cells = [limit.technique.name, str(limit.plans[0].world_size), str(limit.layers)]
        cells += [f"{limit.num_parameters / 1e6:,.2f}", f"**{limit.num_parameters / alone:.2f}**"]
        cells += [f"{size / unit:.1f}" for size in (fitting.total, fitting.activations, fitting.peak, fitting.host)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def confirmations_table(found: Sequence[Confirmation], cap: Bytes) -> str:
    """Both sides of each line, estimated and measured on the worst rank, as a Markdown table."""
    heads = ["technique", "layers", "estimated, MB", "measured, MB", "of the cap", ""]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for one in found:
        for side, word in enumerate(("fits", "does not fit")):
            measured = one.measured(side).peak
            says = word if (measured <= cap) == (side == 0) else f"**should be: {word}**"
            cells = [one.limit.technique.name, str(one.limit.layers + side)]
            cells += [f"{one.limit.estimates[side].peak / MB:.2f}", f"{measured / MB:.2f}"]
            lines.append("| " + " | ".join([*cells, f"{100 * measured / cap:.1f} %", says]) + " |")
    return "\n".join(lines)


def run() -> int:
    """Search, run both sides, print, and keep the record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run steps of techniques so named alone")
    parser.add_argument("--estimate", action="store_true", help="run no steps")
    parser.add_argument("--record", action="store_true", help=f"write {RECORDS}/limits.*")
    arguments = parser.parse_args()
    if arguments.record and (arguments.estimate or arguments.only):
        parser.error("--record keeps what was confirmed: leave out --estimate and --only")
    began, cap = time.perf_counter(), parse_bytes(SMALL.cap)
    small, large = ([limit_of(technique, family) for technique in TECHNIQUES] for family in (SMALL, LARGE))
    text = f"{SMALL.told}\n\n{limits_table(small, MB)}\n\nBy estimates alone: {LARGE.told}\n\n{limits_table(large, GB)}"
    print(f"{text}\n", flush=True)
    if arguments.estimate:
        return 0
    chosen = [limit for limit in small if limit.technique.confirmed]
    found = confirm([one for one in chosen if not arguments.only or one.technique.name in arguments.only])
    confirmed = confirmations_table(found, cap)
    held = sum(one.holds(cap) for one in found)
    summary = f"{held} of {len(found)} lines are where the estimate puts them"
    print(f"{confirmed}\n\n{summary}, in {time.perf_counter() - began:.0f} s")
    if arguments.record:
        _write([(SMALL, small), (LARGE, large)], found, f"{text}\n\n{summary}:\n\n{confirmed}\n")
    return 0 if held == len(found) else 1


def _row(limit: Limit, ran: Confirmation | None) -> dict[str, Any]:
    row = {"technique": limit.technique.name, "ranks": limit.plans[0].world_size, "layers": limit.layers}
    row |= {"parameters": limit.num_parameters, "estimated": [record.as_json() for record in limit.estimates]}
    return row if ran is None else row | {"measured": [ran.measured(side).as_json() for side in (0, 1)]}


def _write(families: Sequence[tuple[Family, list[Limit]]], found: Sequence[Confirmation], text: str) -> None:
    ran = {id(one.limit): one for one in found}
    command = "python -m benchmarks.limits --record"
    content = {"command": command, "date": time.strftime("%Y-%m-%d"), "environment": environment(2)}
    content["families"] = [
        {**asdict(family), "rows": [_row(limit, ran.get(id(limit))) for limit in limits]} for family, limits in families
    ]
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / "limits.json").write_text(json.dumps(content, indent=1) + "\n")
    note = "State, activations, peak and host are the estimate of the worst rank of the largest model that fits."
    (RECORDS / "limits.md").write_text(f"`{command}`\n\n{note}\n\n{text}")


if __name__ == "__main__":
    sys.exit(run())
