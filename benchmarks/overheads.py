"""What Shardwright itself takes: to start, for each action of a schedule, to plan; and how each grows.

    python -m benchmarks.overheads [--rounds 5] [--record]

start-up: seconds from the command `shardwright train` to the first row of steps.jsonl, on a tiny model. executor: the
time of the main thread's processor for an action (sends, receives and autograd included), with blocks that compute
next to nothing: a step of 1F1B with 32 microbatches over as many stages as ranks. plan: seconds and the most memory of
`shardwright plan` for recipes of 405 B parameters and more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import RECORDS, environment
from shardwright.comm.job import Job
from shardwright.comm.launch import launch
from shardwright.comm.worker import Worker
from shardwright.parallel.compose import compose
from shardwright.plan.pipeline import schedule_of
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.record.store import read_json, write_json
from shardwright.spec.load import build

WORLDS = (2, 4, 8)
MICROBATCHES = 32
RECIPES = ("llama-3.1-405b", "megatron-turing-530b", "gpt-1t")
TINY = {"layers": 8, "hidden": 64, "heads": 2, "ffn": 64, "vocab": 257}


# Start-up


def start_up(world: int) -> float:
    """Seconds from the command to the first step."""
    fields = [f"model.{name}={value}" for name, value in TINY.items()]
    fields += ["data.corpus=random", "data.eval_every=0", "train.sequence_length=32", "train.steps=2"]
    fields += [
        f"train.global_batch_size={world}",
        "train.micro_batch_size=1",
        f"parallel.dp={world}",
        "checkpoint.keep=1",
    ]
    with tempfile.TemporaryDirectory() as folder:
        recipe, run = Path(folder) / "recipe.toml", Path(folder) / "run"
        recipe.write_text("")
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "shardwright", "train", str(recipe), *fields, "--run-dir", str(run)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not _has_a_row(run / "steps.jsonl") and process.poll() is None:
            time.sleep(0.005)
        seconds = time.perf_counter() - began
        if process.wait():
            raise SystemExit(process.returncode)
        return seconds


def _has_a_row(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


# Executor


class _Scale(nn.Module):
    """A block of next to no computation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """The same, times a number."""
        return x * self.weight


class _First(_Scale):
    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T] to hidden states [T, B, hidden]."""
        return x.T.float().unsqueeze(-1).expand(-1, -1, TINY["hidden"]) * self.weight


class _Last(_Scale):
    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """The sum of everything."""
        return (x * self.weight).sum()


class _Chain(nn.Module):
    """A model of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([_First(), *(_Scale() for _ in range(TINY["layers"])), _Last()])

    def blocks(self) -> list[nn.Module]:
        """The parts in order."""
        return list(self.parts)


def _plan(world: int) -> Plan:
    train = {"sequence_length": 32, "global_batch_size": MICROBATCHES, "micro_batch_size": 1, "dtype": "fp32"}
    tables = {"model": TINY, "train": train, "parallel": {"pp": world, "dp": 1, "zero": 0}}
    return resolve(build(tables), world_size=world, device="cpu", native_bf16=False, tokenizer_vocab=None)


def main(worker: Worker, arguments: tuple[str, ...]) -> None:
    """A rank: microseconds of its main thread's processor for an action, step by step."""
    folder, rounds = Path(arguments[0]), int(arguments[1])
    torch.set_num_threads(1)
    plan = _plan(worker.world_size)
    mesh = worker.mesh(plan.topology)
    runtime = compose(plan, mesh, _Chain())
    tokens = torch.zeros(1, plan.sequence_length, dtype=torch.int64)
    microbatches, scale = [(tokens, tokens)] * MICROBATCHES, torch.ones((), dtype=torch.float64)
    actions = len(schedule_of(plan).actions[mesh.coordinate.pp])
    found = []
    for _ in range(rounds + 1):  # the first one warms up
        began = time.thread_time()
        runtime.pipeline.run(microbatches, scale)
        found.append((time.thread_time() - began) / actions * 1e6)
        runtime.states.collect_gradients()
    write_json(folder / f"{mesh.rank}.json", found[1:])


def executor(world: int, rounds: int) -> list[float]:
    """Microseconds for an action on the busiest rank, by round."""
    with tempfile.TemporaryDirectory() as folder:
        if code := launch(Job(world, "benchmarks.overheads", (folder, str(rounds)))):
            raise SystemExit(code)
        ranks = [read_json(Path(folder) / f"{rank}.json") for rank in range(world)]
    return [max(own) for own in zip(*ranks, strict=True)]


# Planning


_PLAN = """
import sys
from shardwright.cli.main import main
try:
    main()
finally:
    sys.stderr.write(open("/proc/self/status").read())
"""
# What wait4 tells of a child's memory begins with that of the process it was forked from.


def planning(recipe: str) -> tuple[float, int]:
    """Seconds and the most resident bytes of `shardwright plan`."""
    command = [sys.executable, "-c", _PLAN, "plan", f"recipes/{recipe}.toml", "--hardware", "H100-SXM"]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - began
    return seconds, int(done.stderr.split("VmHWM:")[1].split()[0]) << 10


def _row(what: str, size: str, values: Sequence[float], unit: str, note: str = "") -> dict[str, Any]:
    return {"what": what, "size": size, "values": list(values), "unit": unit, "note": note}


def told(rows: Sequence[dict[str, Any]]) -> str:
    """The record for people."""
    lines = ["| what | of | median (least to most) | |", "|---|---|---|---|"]
    for row in rows:
        low, middle, high = (f"{f(row['values']):.3g}" for f in (min, statistics.median, max))
        lines.append(f"| {row['what']} | {row['size']} | {middle} {row['unit']} ({low} to {high}) | {row['note']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help=f"write {RECORDS}/overheads.*")
    asked = parser.parse_args()
    table = [_row("start-up", f"{n} ranks", [start_up(n) for _ in range(asked.rounds)], "s") for n in WORLDS]
    for ranks in WORLDS:
        note = f"{len(schedule_of(_plan(ranks)).actions[0])} actions on the first rank"
        table.append(_row("executor, an action", f"{ranks} ranks", executor(ranks, asked.rounds), "us", note))
    for name in RECIPES:
        planned = [planning(name) for _ in range(asked.rounds)]
        note = f"{max(size for _, size in planned) / 1e6:.0f} MB resident"
        table.append(_row("plan", name, [seconds for seconds, _ in planned], "s", note))
    print(told(table))
    if asked.record:
        command = f"python -m benchmarks.overheads --rounds {asked.rounds}"
        content = {
            "command": command,
            "date": time.strftime("%Y-%m-%d"),
            "environment": environment(max(WORLDS)),
            "rows": table,
        }
        (RECORDS / "overheads.json").write_text(json.dumps(content, indent=1) + "\n")
        (RECORDS / "overheads.md").write_text(f"`{command}`\n\n{told(table)}\n")
