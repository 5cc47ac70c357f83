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
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from shardwright.comm.process import GIVES_WAY, keep_freed_memory, transport_threads
from shardwright.plan.machine import available_memory, num_cores

RECORDS = Path(__file__).parent / "records"

COMPARED = 3
"""First steps of which the losses are compared."""

LEFT_FREE = 1 << 30
FEWER = "all cases that take turns live at once, so race fewer at a time (--case)"

Quartiles = tuple[float, float, float]

Step = Callable[[int], float]
"""Runs one training step on this rank's part of global batch i, and returns the loss."""


@dataclass(frozen=True)
class Case:
    """One contender: `make(rank, world)` builds it in a rank. `precision` states parameters, gradients, reduction and
    masters; `peers` and `ceiling` name the cases that it is compared with. `batch`: its turns are a batch job's, in
    which gloo's threads give way where ranks share cores, as in Shardwright's ranks (`comm/process.py`); peers are
    scheduled as their users' processes are. A `bound` trains
    nothing: its loss says nothing. The step of a `modelled` case returns, instead of a loss, the seconds that a step
    would take, worked out from what it measured."""

    name: str
    precision: str
    make: Callable[[int, int], Step]
    peers: tuple[str, ...] = ()
    ceiling: str = ""
    batch: bool = False
    bound: bool = False
    modelled: bool = False


@dataclass
class Result:
    """Seconds per step by round, on the slowest rank, and the first losses, which must be alike for all cases. Rounds
    of one `group` took place together, and those alone are compared."""

    name: str
    precision: str
    peers: tuple[str, ...]
    ceiling: str
    losses: list[float]
    seconds: list[float] = field(default_factory=list)
    group: int = 0


@dataclass
class Peak:
    """The most memory that each rank of a case had resident, in bytes, and what it had before the case was made."""

    name: str
    before: list[int]
    peak: list[int]


def _join(rank: int, world: int, store: str) -> None:
    """What every rank of every case does first."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    keep_freed_memory()  # for every case alike: the peers gain from it as well
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)


def _leave() -> None:
    """End this rank without what a contender would do at its process's end."""
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


@cache
def _may_raise_priorities() -> bool:
    """Whether a thread's priority can be put back where it was; if not, it is lowered for nobody."""

    def lower_and_raise() -> None:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, GIVES_WAY)
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, 0)
        found.append(os.getpriority(os.PRIO_PROCESS, thread) == 0)

    found: list[bool] = []
    trial = threading.Thread(target=lower_and_raise)
    trial.start()
    trial.join()
    return found == [True]


def _schedule(case: Case, world: int) -> None:
    """Let all threads of this process be scheduled as the case's would be."""
    policy = os.SCHED_BATCH if case.batch else os.SCHED_OTHER
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended since
            os.sched_setscheduler(int(thread), policy, os.sched_param(0))
    if world > num_cores() and _may_raise_priorities():
        for thread in transport_threads():
            os.setpriority(os.PRIO_PROCESS, thread, GIVES_WAY if case.batch else 0)


def _seconds(case: Case, step: Step, indices: Sequence[int], world: int) -> float:
    """Mean seconds of these steps."""
    _schedule(case, world)
    dist.barrier()
    began = time.perf_counter()
    returned = [step(index) for index in indices]
    dist.barrier()
    return statistics.mean(returned) if case.modelled else (time.perf_counter() - began) / len(indices)


def _rank(rank: int, world: int, store: str, cases: Sequence[Case], rounds: int, steps: int, out: str) -> None:
    _join(rank, world, store)
    made = {case.name: case.make(rank, world) for case in cases}
    losses = {}
    for case in cases:
        losses[case.name] = [made[case.name](index) for index in range(COMPARED)]
        if (left := available_memory()) is not None and left < LEFT_FREE:  # it would crawl before it failed
            raise SystemExit(f"error: {left / 1e6:.0f} MB of memory are left with {case.name}: {FEWER}")
    results = [Result(c.name, c.precision, c.peers, c.ceiling, [] if c.bound else losses[c.name]) for c in cases]
    for index in range(rounds + 1):  # the first round warms up
        order = range(len(cases)) if index % 2 else reversed(range(len(cases)))
        for i in order:
            numbers = range(COMPARED + index * steps, COMPARED + (index + 1) * steps)
            seconds = _seconds(cases[i], made[cases[i].name], numbers, world)
            if index:
                results[i].seconds.append(seconds)
        if rank == 0 and sys.stderr.isatty():
            print(f"round {index}/{rounds}", file=sys.stderr)
    if rank == 0:
        Path(out).write_text(json.dumps([asdict(result) for result in results]))
    _leave()


def _spawn(rank: Callable[..., None], world: int, *arguments: object) -> None:
    """Run a function in fresh processes, each given its rank first. Raises SystemExit where one ended early."""
    try:
        mp.spawn(rank, (world, *arguments), nprocs=world)  # type: ignore[no-untyped-call]
    except mp.ProcessExitedException as ended:  # one that was not killed has told why
        killed = f"error: rank {ended.error_index} was killed by {ended.signal_name}"
        raise SystemExit(killed if ended.signal_name else ended.exit_code) from None


def race(cases: Sequence[Case], *, world: int, rounds: int, steps: int, group: int = 0) -> list[Result]:
    """Time every case in turn, `rounds` times, `steps` steps each time, on `world` processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/results.json"
        _spawn(_rank, world, f"{folder}/store", list(cases), rounds, steps, out)
        found = json.loads(Path(out).read_text())
        return [Result(**row | {"peers": tuple(row["peers"]), "group": group}) for row in found]


def _resident(field_name: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS is what is resident now, VmHWM the most that ever was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field_name}:"))


def _peak_rank(rank: int, world: int, store: str, case: Case, steps: int, out: str) -> None:
    _join(rank, world, store)
    before = _resident("VmRSS")
    step = case.make(rank, world)
    for index in range(steps):
        step(index)
    Path(f"{out}.{rank}").write_text(json.dumps([before, _resident("VmHWM")]))
    _leave()


def peaks(cases: Sequence[Case], *, world: int, steps: int = 2) -> list[Peak]:
    """Peak resident memory of every case, each in fresh processes: the mark of a process cannot be set back."""
    found = []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/peak"
            _spawn(_peak_rank, world, f"{folder}/store", case, steps, out)
            rows = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(world)]
            found.append(Peak(case.name, [before for before, _ in rows], [peak for _, peak in rows]))
    return found


def quartiles(values: Sequence[float]) -> Quartiles:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def against(result: Result, other: Result) -> Quartiles:
    """Quartiles of how many times faster one case is than another, round by round."""
    return quartiles([theirs / ours for ours, theirs in zip(result.seconds, other.seconds, strict=True)])


def _compared(result: Result, results: Sequence[Result]) -> tuple[dict[str, Quartiles], Quartiles | None]:
    """How many times faster a case is than each of its peers that took turns with it, and than its ceiling."""
    named = {other.name: other for other in results if other.group == result.group}
    top = named.get(result.ceiling)
    return {p: against(result, named[p]) for p in result.peers if p in named}, against(result, top) if top else None


def shown(quotient: Quartiles) -> str:
    """A median with its quartiles."""
    return f"**{quotient[1]:.2f}** ({quotient[0]:.2f} to {quotient[2]:.2f})"


def table(results: Sequence[Result], tokens_per_step: int, memory: Sequence[Peak] = ()) -> str:
    """Medians with quartiles, ratios by pairs, and the most memory of any rank, as a Markdown table."""
    peak = {found.name: max(found.peak) for found in memory}
    heads = ["case", "parameters / gradients / reduced in / masters", "ms a step (quartiles)", "tokens/s"]
    heads += ["times as fast as", "of its ceiling", *(["most resident, MB"] if memory else [])]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for result in results:
        low, middle, high = quartiles(result.seconds)
        beside, top = _compared(result, results)
        pairs = [f"{shown(quotient)} {name}" for name, quotient in beside.items()]
        cells = [result.name, result.precision, f"{middle * 1e3:.0f} ({low * 1e3:.0f} to {high * 1e3:.0f})"]
        cells += [f"{tokens_per_step / middle:,.0f}", "<br>".join(pairs), shown(top) if top else ""]
        if memory:
            cells.append(f"{peak[result.name] / 1e6:.0f}" if result.name in peak else "")
        lines.append("| " + " | ".join(cells) + " |")
    if groups := max(result.group for result in results):
        lines += ["", f"Raced in {groups + 1} groups, which memory holds one at a time: a ratio is within its group."]
    if memory:
        before = max(size for found in memory for size in found.before)
        lines += ["", f"Of the memory up to {before / 1e6:.0f} MB were there before a case was made."]
    return "\n".join(lines)


def check_losses(results: Sequence[Result], tolerance: float) -> str:
    """What the first losses were. Raises SystemExit where two contenders do not train the same: of a race between
    different things no figure means anything."""
    trained = [result for result in results if result.losses]
    for index, losses in enumerate(zip(*(result.losses for result in trained), strict=True)):
        if max(losses) - min(losses) > tolerance * min(losses):
            rows = ", ".join(f"{r.name} {r.losses[index]:.5f}" for r in trained)
            raise SystemExit(f"error: the losses of step {index} differ by more than {tolerance:g} of them: {rows}")
    ends = [(min(column), max(column)) for column in zip(*(result.losses for result in trained), strict=True)]
    return "losses of the first steps: " + ", ".join(f"{low:.4f} to {high:.4f}" for low, high in ends)


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


def write_record(
    name: str, command: str, results: Sequence[Result], world: int, tokens_per_step: int, memory: Sequence[Peak] = ()
) -> Path:
    """Keep a run's figures beside the command that made them."""
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{name}.json"
    compared = [_compared(result, results) for result in results]
    content = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(world),
        "tokens_per_step": tokens_per_step,
        "results": [
            {**asdict(result), "beside_peers": beside, "of_ceiling": top}
            for result, (beside, top) in zip(results, compared, strict=True)
        ],
        "memory": [asdict(peak) for peak in memory],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".md").write_text(f"`{command}`\n\n{table(results, tokens_per_step, memory)}\n")
    return path
