"""Recorded steps in the trace event format, which Perfetto and chrome://tracing open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from shardwright.report.page.run import Run
from shardwright.schedule.action import Action

Event = dict[str, Any]

_ACTIONS, _WAITS = 0, 1
_ROWS = {_ACTIONS: "actions", _WAITS: "waits"}
_MICROSECONDS = 1e6


def trace(runs: Sequence[Run]) -> dict[str, Any]:
    """The events of all ranks with a timeline: a process for each rank, a row of actions and one of waits."""
    events: list[Event] = []
    first = 0
    for run in runs:
        events += _events(run, first, f"{run.name} " if len(runs) > 1 else "")
        first += run.plan.world_size
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _events(run: Run, first: int, prefix: str) -> Iterator[Event]:
    for rank, file in run.ranks.items():
        if file.timeline is None:
            continue
        pid, here = first + rank, run.plan.topology.coordinate(rank)
        pipeline = f"replicate {here.replicate}, shard {here.shard}, tp {here.tp}"
        name = f"{prefix}pipeline of {pipeline}: rank {rank} (pp {here.pp})"
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
        yield {
            "ph": "M",
            "name": "process_sort_index",
            "pid": pid,
            "tid": 0,
            "args": {"sort_index": _place(run, pid, first)},
        }
        for tid, row in _ROWS.items():
            yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": row}}
        for segment in file.timeline.segments:
            action = Action.from_words(segment.doing)
            kind = action.kind.value if action else "phase"
            waited = {"waited_us": round(segment.waited * _MICROSECONDS, 1)}
            yield _event(segment.doing, kind, pid, _ACTIONS, segment.begin, segment.end, waited)
        for wait in file.timeline.waits:
            yield _event(wait.collective, "wait", pid, _WAITS, wait.begin, wait.end, {})


def _place(run: Run, pid: int, first: int) -> int:
    """Ranks of one pipeline stand together."""
    topology = run.plan.topology
    here = topology.coordinate(pid - first)
    pipeline = (here.replicate * topology.shard + here.shard) * topology.tp + here.tp
    return first + pipeline * topology.pp + here.pp


def _event(name: str, kind: str, pid: int, tid: int, begin: float, end: float, args: dict[str, Any]) -> Event:
    times = {"ts": round(begin * _MICROSECONDS, 1), "dur": round((end - begin) * _MICROSECONDS, 1)}
    return {"ph": "X", "name": name, "cat": kind, "pid": pid, "tid": tid, **times, "args": args}
