"""When everything of a schedule happens, given what each stage costs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

from shardwright.schedule.action import Action, Kind, Schedule, StageCost
from shardwright.schedule.dependencies import Result, needs, result
from shardwright.schedule.errors import ScheduleError


class Span(NamedTuple):
    """One action that computes, and when."""

    action: Action
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A schedule with times, in the unit of the costs: `spans[r]` is what rank r computes, in order.

    `sequence` holds all spans in the order of their begin; at equal times a producer comes before its consumer, and a
    rank's own order is kept.
    """

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]
    sequence: tuple[Span, ...]

    @cached_property
    def makespan(self) -> float:
        """The time from the first begin, 0, to the last end."""
        return max((spans[-1].end for spans in self.spans if spans), default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Per rank, the time it computes."""
        return tuple(sum(span.end - span.begin for span in spans) for spans in self.spans)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they do not compute."""
        whole = len(self.spans) * self.makespan
        return 1 - sum(self.busy) / whole if whole else 0.0

    @cached_property
    def live_microbatches(self) -> LiveMicrobatches:
        """How many microbatches are kept at once, at the peak."""
        return live_microbatches(self.schedule)

    def order(self) -> list[Action]:
        """All actions that compute, in one order in which they could be run one after another."""
        return [span.action for span in self.sequence]


@dataclass(frozen=True)
class LiveMicrobatches:
    """The peak number of microbatches whose F is done and whose B or W is not.

    On a rank, a microbatch counts once for each of the rank's stages that keeps it.
    """

    per_stage: tuple[int, ...]
    per_rank: tuple[int, ...]


def live_microbatches(schedule: Schedule) -> LiveMicrobatches:
    """The peaks of a schedule; they follow from the ranks' own orders, not from any costs."""
    per_stage, per_rank = [0] * schedule.num_stages, [0] * schedule.num_ranks
    live = [0] * schedule.num_stages
    change = {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.WEIGHT: -1}
    for rank, actions in enumerate(schedule.actions):
        on_rank = 0
        for action in actions:
            step = change.get(action.kind, 0)
            on_rank += step
            live[action.stage] += step
            per_rank[rank] = max(per_rank[rank], on_rank)
            per_stage[action.stage] = max(per_stage[action.stage], live[action.stage])
    return LiveMicrobatches(tuple(per_stage), tuple(per_rank))


def simulate(schedule: Schedule, costs: Sequence[StageCost] | None = None, transfer: float = 0.0) -> Timeline:
    """The timeline in which every action begins as soon as its rank is free and its inputs are there.

    `costs` are per stage, by default one unit for each of F, I and W. What another rank computed is there `transfer`
    later. Transfer actions take no time of a rank, and are not in the timeline. Each action is looked at once, and
    once more if it had to wait. Raises ScheduleError if some action waits for ever.
    """
    costs = [StageCost()] * schedule.num_stages if costs is None else costs
    if len(costs) != schedule.num_stages:
        raise ScheduleError(f"costs: {len(costs)} are given for {schedule.num_stages} stages", "one per stage")
    run = _Run(schedule, costs, transfer)
    ready = deque(range(schedule.num_ranks))
    while ready:
        ready.extend(run.advance(ready.popleft()))
    run.check_finished()
    sequence = sorted(run.finished, key=attrgetter("begin"))  # stable: at equal times the order of simulation
    return Timeline(schedule, tuple(tuple(spans) for spans in run.spans), tuple(sequence))


class _Task(NamedTuple):
    """What a kind of action does on a stage, for any microbatch: `inputs` are (result, its ends, its transfer)."""

    cost: float
    inputs: tuple[tuple[Result, list[float | None], float], ...]
    gives: Result | None


class _Run:
    """A simulation under way: each rank goes on until it needs what nobody has computed yet, then waits for it."""

    def __init__(self, schedule: Schedule, costs: Sequence[StageCost], transfer: float) -> None:
        self.schedule = schedule
        self.spans: list[list[Span]] = [[] for _ in schedule.actions]
        self.finished: list[Span] = []
        self.ends: dict[Result, list[float | None]] = {
            (kind, stage): [None] * schedule.num_microbatches
            for kind in (Kind.FORWARD, Kind.INPUT)
            for stage in range(schedule.num_stages)
        }
        self.waiting: dict[tuple[Result, int], list[int]] = {}
        tasks = {
            (kind, stage): self._task(kind, stage, cost, transfer)
            for stage, cost in enumerate(costs)
            for kind in Kind
            if kind.computes
        }
        self.programs = [
            [(action, tasks[action.kind, action.stage]) for action in actions if action.kind.computes]
            for actions in schedule.actions
        ]

    def _task(self, kind: Kind, stage: int, cost: StageCost, transfer: float) -> _Task:
        placement, inputs = self.schedule.placement, []
        for need in needs(kind, stage, len(placement)):
            delay = 0.0 if placement[need[1]] == placement[stage] else transfer
            inputs.append((need, self.ends[need], delay))
        return _Task(cost.of(kind), tuple(inputs), result(kind, stage))

    def advance(self, rank: int) -> list[int]:
        """Simulate a rank until it waits or has finished; gives the ranks that waited for what it computed."""
        spans, woken = self.spans[rank], []
        free = spans[-1].end if spans else 0.0
        program = self.programs[rank]
        for position in range(len(spans), len(program)):
            action, task = program[position]
            begin, microbatch = free, action.microbatch
            for need, ends, delay in task.inputs:
                end = ends[microbatch]
                if end is None:
                    self.waiting.setdefault((need, microbatch), []).append(rank)
                    return woken
                begin = max(begin, end + delay)
            free = begin + task.cost
            span = Span(action, begin, free)
            spans.append(span)
            self.finished.append(span)
            if task.gives is not None:
                self.ends[task.gives][microbatch] = free
                woken += self.waiting.pop((task.gives, microbatch), ())
        return woken

    def check_finished(self) -> None:
        """Raise ScheduleError if a rank still waits."""
        for rank, (program, spans) in enumerate(zip(self.programs, self.spans, strict=True)):
            if len(spans) < len(program):
                raise ScheduleError(
                    f"schedule {self.schedule.name}: rank {rank} waits for ever in {program[len(spans)][0]}",
                    "validate(schedule) tells what every rank waits for",
                )
