"""Race Shardwright and its peers: every case of a race in turns within one run, medians and ratios by pairs.

    python -m benchmarks [--race zero-0 tp ...] [--model small-25m] [--dtype fp32 bf16] [--rounds 9] [--record]

Races: zero-0, zero-1, zero-2, zero-3, tp, pp, 3d. Every case starts from the same values and trains on the same tokens,
clips by the global norm and updates with fused AdamW; the first losses are compared. Peak memory is measured first,
each case in fresh processes; where memory does not hold all cases at once, they are raced in groups. DeepSpeed takes
part where it is installed: pip install 'shardwright[bench]'.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.document import update
from benchmarks.grouping import grouped, takes
from benchmarks.harness import LEFT_FREE, Case, Peak, check_losses, peaks, race, table, write_record
from benchmarks.peers import deepspeed
from benchmarks.race import data, pipeline, tensor, three_d
from benchmarks.race.setting import MODELS, Race, Setting
from shardwright.plan.machine import available_memory, cpu_computes_bf16
from shardwright.units import Bytes

NAMES = ("zero-0", "zero-1", "zero-2", "zero-3", "tp", "pp", "3d")
SAME = {"fp32": 1e-5, "bf16": 3e-4}
"""How far the first losses may lie apart: some peers keep no masters under bf16."""


def races(setting: Setting) -> list[Race]:
    """Every race of a setting."""
    return [found for kind in (data, tensor, pipeline, three_d) for found in kind.races(setting)]


def chosen(cases: Sequence[Case], parts: Sequence[str]) -> list[Case]:
    """The cases whose names hold one of these, or end in it where it ends in $; all without any."""

    def holds(name: str, part: str) -> bool:
        return name.endswith(part[:-1]) if part.endswith("$") else part in name

    return [case for case in cases if not parts or any(holds(case.name, part) for part in parts)]


def main() -> None:
    """Run races, print their tables, keep their records."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--race", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    # Without units for it bf16 is many times slower than fp32.
    native = ["fp32", "bf16"] if cpu_computes_bf16() else ["fp32"]
    parser.add_argument("--dtype", nargs="+", default=native, choices=["fp32", "bf16"])
    parser.add_argument(
        "--case", nargs="+", default=[], metavar="PART", help="cases whose names hold one of these (end in it: PART$)"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1, help="steps a case takes in each round")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory; all cases live at once")
    parser.add_argument("--all-as-batch", action="store_true", help="peers as a batch job too; not to be recorded")
    parser.add_argument("--record", action="store_true", help="keep the figures, and put them into the documentation")
    arguments = parser.parse_args()
    if arguments.all_as_batch and arguments.record:
        parser.error("--all-as-batch: records are of peers as their users start them; leave one of the two out")
    for name in ("rounds", "steps"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: {getattr(arguments, name)} is not at least 1")
    if not deepspeed.available():
        print("DeepSpeed is not installed and takes no part: pip install 'shardwright[bench]'", file=sys.stderr)
    settings = [Setting(model, dtype) for model in arguments.model for dtype in arguments.dtype]
    found = [(setting, one) for setting in settings for one in races(setting) if one.name in arguments.race]
    found = [(setting, one) for setting, one in found if chosen(one.cases, arguments.case)]
    if not found:
        parser.error(f"--case: no case of {', '.join(arguments.race)} has one of these in its name: {arguments.case}")
    failed = []
    for setting, one in found:
        try:
            _run(setting, one, arguments)
        except SystemExit as ended:  # the others can be run all the same
            print(ended.code if isinstance(ended.code, str) else "", file=sys.stderr)
            failed.append(f"{one.name} of {setting.model} in {setting.dtype}")
    if arguments.record:
        update()
    if failed:
        raise SystemExit(f"error: without a result: {', '.join(failed)}")


def _room(memory: Sequence[Peak]) -> Bytes | None:
    """Bytes for all cases of a race, beside what its ranks have without them."""
    available = available_memory()
    return None if available is None else Bytes(available - LEFT_FREE - max(sum(found.before) for found in memory))


def _run(setting: Setting, found: Race, arguments: argparse.Namespace) -> None:
    cases, world = chosen(found.cases, arguments.case), found.world
    if arguments.all_as_batch:
        cases = [replace(case, batch=True) for case in cases]
    print(f"## {setting.model}, {setting.dtype}: {found.title}\n", flush=True)
    measured = [] if arguments.no_memory else peaks([case for case in cases if not case.bound], world=world)
    groups = grouped(cases, takes(cases, measured), _room(measured)) if measured else [cases]
    results = []
    for number, group in enumerate(groups):
        results += race(group, world=world, rounds=arguments.rounds, steps=arguments.steps, group=number)
    print(f"{check_losses(results, SAME[setting.dtype])}\n", flush=True)
    print(table(results, found.tokens, measured), end="\n\n", flush=True)
    if arguments.record:
        options = f"--race {found.name} --model {setting.model} --dtype {setting.dtype}"
        options += f" --rounds {arguments.rounds} --steps {arguments.steps}"
        parts = "".join(f' "{part}"' for part in arguments.case)
        command = f"python -m benchmarks {options}" + (f" --case{parts}" if parts else "")
        name = f"race_{found.name}_{setting.model}_{setting.dtype}"
        print(write_record(name, command, results, world, found.tokens, measured), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
