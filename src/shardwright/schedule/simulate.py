"""When everything of a schedule happens, given what each stage costs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, nan
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
class Totals:
    """A timeline summed up by rank: when each begins and ends, and the time that it computes."""

    begins: tuple[float, ...]
    ends: tuple[float, ...]
    busy: tuple[float, ...]

    @property
    def makespan(self) -> float:
        """The time from the first begin, 0, to the last end."""
        return max(self.ends, default=0.0)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they do not compute."""
        whole = len(self.ends) * self.makespan
        return 1 - sum(self.busy) / whole if whole else 0.0


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
    for rank, actions in enumerate(schedule.actions):
        on_rank = 0
        for action in actions:
            kind, stage = action.kind, action.stage
            if kind is Kind.FORWARD:
                on_rank += 1
                live[stage] += 1
                per_rank[rank] = max(per_rank[rank], on_rank)
                per_stage[stage] = max(per_stage[stage], live[stage])
            elif kind is Kind.BACKWARD or kind is Kind.WEIGHT:
                on_rank -= 1
                live[stage] -= 1
    return LiveMicrobatches(tuple(per_stage), tuple(per_rank))


def simulate(
    schedule: Schedule, costs: Sequence[StageCost] | None = None, transfer: float = 0.0, until: float | None = None
) -> Timeline:
    """The timeline in which every action begins as soon as its rank is free and its inputs are there.

    `costs` are per stage, by default one unit for each of F, I and W. What another rank computed is there `transfer`
    later. Transfer actions take no time of a rank, and are not in the timeline. Each action is looked at once, and
    once more if it had to wait. `until` leaves out what begins then or later. Raises ScheduleError if some action waits
    for ever.
    """
    return _timeline(schedule, _of_stages(schedule, costs), transfer, until)


def replay(schedule: Schedule, durations: Mapping[Action, float], transfer: float = 0.0) -> Timeline:
    """The same, where each action that computes takes as long as it was measured to.

    Raises ScheduleError if the time of an action is missing.
    """

    def measured(kind: Kind, stage: int) -> list[float]:
        actions = (Action(kind, stage, microbatch) for microbatch in range(schedule.num_microbatches))
        return [durations.get(action, nan) for action in actions]

    for action in (action for actions in schedule.actions for action in actions if action.kind.computes):
        if action not in durations:
            raise ScheduleError(f"schedule {schedule.name}: no time of {action} was measured", "record a whole step")
    return _timeline(schedule, measured, transfer, None)


def _timeline(schedule: Schedule, costs: _Costs, transfer: float, until: float | None) -> Timeline:
    spans: list[list[Span]] = [[] for _ in schedule.actions]
    run = _Run(schedule, costs, transfer, until, spans)
    sequence = sorted(run.finished, key=attrgetter("begin"))  # stable: at equal times the order of simulation
    return Timeline(schedule, tuple(tuple(of_rank) for of_rank in spans), tuple(sequence))


def simulated_totals(schedule: Schedule, costs: Sequence[StageCost] | None = None, transfer: float = 0.0) -> Totals:
    """What `simulate` gives, summed up by rank: for large schedules in less than half of the time."""
    run = _Run(schedule, _of_stages(schedule, costs), transfer, None, None)
    return Totals(tuple(run.begins), tuple(run.free), tuple(run.busy))


_Costs = Callable[[Kind, int], Sequence[float]]
"""What a kind of action costs on a stage, by microbatch."""


def _of_stages(schedule: Schedule, costs: Sequence[StageCost] | None) -> _Costs:
    """The same for all microbatches of a stage."""
    given = [StageCost()] * schedule.num_stages if costs is None else costs
    if len(given) != schedule.num_stages:
        raise ScheduleError(f"costs: {len(given)} are given for {schedule.num_stages} stages", "one per stage")
    return lambda kind, stage: [given[stage].of(kind)] * schedule.num_microbatches


class _Task(NamedTuple):
    """What a kind of action does on a stage, by microbatch: `inputs` are (result, its ends, its transfer)."""

    costs: Sequence[float]
    inputs: tuple[tuple[Result, list[float | None], float], ...]
    gives: Result | None
    given: list[float | None]


class _Run:
    """A simulation: each rank goes on until it needs what nobody has computed yet, then waits for it.

    `spans`, where they are given, are filled.
    """

    def __init__(
        self,
        schedule: Schedule,
        costs: _Costs,
        transfer: float,
        until: float | None,
        spans: list[list[Span]] | None,
    ) -> None:
        self.schedule, self.spans, self.until = schedule, spans, until
        self.finished: list[Span] = []
        self.free = [0.0] * schedule.num_ranks
        self.begins, self.busy = list(self.free), list(self.free)
        self.ends: dict[Result, list[float | None]] = {
            (kind, stage): [None] * schedule.num_microbatches
            for kind in (Kind.FORWARD, Kind.INPUT)
            for stage in range(schedule.num_stages)
        }
        self.waiting: dict[tuple[Result, int], list[int]] = {}
        self.programs = self._programs(costs, transfer)
        self.positions = [0] * schedule.num_ranks
        ready = deque(range(schedule.num_ranks))
        while ready:
            ready.extend(self._advance(ready.popleft()))
        if until is None:
            self._check_finished()

    def _programs(self, costs: _Costs, transfer: float) -> list[list[tuple[Action, _Task]]]:
        """Of each rank the actions that compute, and what they do."""
        tasks = {
            (kind, stage): self._task(kind, stage, costs(kind, stage), transfer)
            for stage in range(self.schedule.num_stages)
            for kind in Kind
            if kind.computes
        }
        return [
            [(action, tasks[key]) for action in actions if (key := (action.kind, action.stage)) in tasks]
            for actions in self.schedule.actions
        ]

    def _task(self, kind: Kind, stage: int, costs: Sequence[float], transfer: float) -> _Task:
        placement, inputs = self.schedule.placement, []
        for need in needs(kind, stage, len(placement)):
            delay = 0.0 if placement[need[1]] == placement[stage] else transfer
            inputs.append((need, self.ends[need], delay))
        gives = result(kind, stage)
        return _Task(costs, tuple(inputs), gives, self.ends[gives] if gives else [])

    def _advance(self, rank: int) -> list[int]:
        """Simulate a rank until it waits or has finished; gives the ranks that waited for what it computed."""
        woken: list[int] = []
        program, waiting, free, busy = self.programs[rank], self.waiting, self.free[rank], self.busy[rank]
        until = inf if self.until is None else self.until
        for position in range(self.positions[rank], len(program)):
            action, task = program[position]
            begin, microbatch = free, action.microbatch
            for need, ends, delay in task.inputs:
                end = ends[microbatch]
                if end is None:
                    waiting.setdefault((need, microbatch), []).append(rank)
                    return woken
                if end + delay > begin:
                    begin = end + delay
            if begin >= until:
                return woken
            cost = task.costs[microbatch]
            free = begin + cost
            busy += cost
            if position == 0:
                self.begins[rank] = begin
            self.positions[rank], self.free[rank], self.busy[rank] = position + 1, free, busy
            if self.spans is not None:
                self._record(self.spans[rank], Span(action, begin, free))
            if task.gives is not None:
                task.given[microbatch] = free
                if waits := waiting.pop((task.gives, microbatch), None):
                    woken += waits
        return woken

    def _record(self, spans: list[Span], span: Span) -> None:
        spans.append(span)
        self.finished.append(span)

    def _check_finished(self) -> None:
        """Raise ScheduleError if a rank still waits."""
        for rank, (program, position) in enumerate(zip(self.programs, self.positions, strict=True)):
            if position < len(program):
                raise ScheduleError(
                    f"schedule {self.schedule.name}: rank {rank} waits for ever in {program[position][0]}",
                    "validate(schedule) tells what every rank waits for",
                )
