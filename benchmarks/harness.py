"""Interleaved timing on a world of gloo ranks: rounds in which every case takes its turn, medians and ratios by pairs.

Machines drift: clocks, neighbours, temperature. Cases that take turns within one run, in the same processes, drift
together, and the ratio of two cases of one round says more than the ratio of their means.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RECORDS = Path(__file__).parent / "records"

Step = Callable[[int], float]
"""Runs one training step on this rank's part of global batch i, and returns the loss."""


@dataclass(frozen=True)
class Case:
    """One contender: `make(rank, world)` builds it in a rank. `precision` states parameters, gradients, reduction and
    masters; `peer` names the case that it is compared with."""

    name: str
    precision: str
    make: Callable[[int, int], Step]
    peer: str = ""


@dataclass
class Result:
    """Seconds per step by round, on the slowest rank, and the first loss, which must be alike for all cases."""

    name: str
    precision: str
    peer: str
    first_loss: float
    seconds: list[float] = field(default_factory=list)


def _rank(rank: int, world: int, store: str, cases: Sequence[Case], rounds: int, steps: int, out: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    from shardwright.comm.memory import keep_freed_memory

    keep_freed_memory()  # for every case alike: the peers gain from it as well
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    made = {case.name: case.make(rank, world) for case in cases}
    first = {name: step(0) for name, step in made.items()}
    results = [Result(c.name, c.precision, c.peer, first[c.name]) for c in cases]
    for index in range(rounds + 1):  # the first round warms up
        order = range(len(cases)) if index % 2 else reversed(range(len(cases)))
        for i in order:
            dist.barrier()
            began = time.perf_counter()
            for step in range(steps):
                made[cases[i].name](index * steps + step + 1)
            dist.barrier()
            if index:
                results[i].seconds.append((time.perf_counter() - began) / steps)
        if rank == 0 and sys.stderr.isatty():
            print(f"round {index}/{rounds}", file=sys.stderr)
    if rank == 0:
        Path(out).write_text(json.dumps([asdict(result) for result in results]))
    dist.barrier()
    dist.destroy_process_group()


def race(cases: Sequence[Case], *, world: int, rounds: int, steps: int) -> list[Result]:
    """Time every case in turn, `rounds` times, `steps` steps each time, on `world` processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/results.json"
        mp.spawn(_rank, (world, f"{folder}/store", list(cases), rounds, steps, out), nprocs=world)  # type: ignore[no-untyped-call]
        return [Result(**row) for row in json.loads(Path(out).read_text())]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratio(result: Result, results: Sequence[Result]) -> tuple[float, float, float] | None:
    """Quartiles of how many times faster a case is than its peer, round by round."""
    peer = next((other for other in results if other.name == result.peer), None)
    if peer is None:
        return None
    return quartiles([theirs / ours for ours, theirs in zip(result.seconds, peer.seconds, strict=True)])


def table(results: Sequence[Result], tokens_per_step: int) -> str:
    """Medians with quartiles, and ratios by pairs, as a Markdown table."""
    lines = [
        "| case | parameters / gradients / reduced in / masters | ms a step (quartiles) | tokens/s | beside its peer |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        low, middle, high = quartiles(result.seconds)
        beside = ""
        if (pair := ratio(result, results)) is not None:
            beside = f"**{pair[1]:.2f}** ({pair[0]:.2f} to {pair[2]:.2f}) x {result.peer}"
        times = f"{middle * 1e3:.0f} ({low * 1e3:.0f} to {high * 1e3:.0f})"
        rate = f"{tokens_per_step / middle:,.0f}"
        lines.append(f"| {result.name} | {result.precision} | {times} | {rate} | {beside} |")
    return "\n".join(lines)


def environment(world: int) -> dict[str, Any]:
    """What was measured on."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "ranks": world,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": "gloo",
    }


def write_record(name: str, command: str, results: Sequence[Result], world: int, tokens_per_step: int) -> Path:
    """Keep a run's figures beside the command that made them."""
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{name}.json"
    content = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(world),
        "tokens_per_step": tokens_per_step,
        "results": [{**asdict(result), "beside_peer": ratio(result, results)} for result in results],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".md").write_text(f"`{command}`\n\n{table(results, tokens_per_step)}\n")
    return path
