"""The measured times of a plan's pipeline: its bubble, and what the simulator makes of the same durations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from shardwright.plan.pipeline import computing_schedule_of
from shardwright.plan.plan import Plan
from shardwright.record.timeline import Segment, TimelineRecord
from shardwright.schedule.action import Action
from shardwright.schedule.simulate import replay
from shardwright.units import Seconds


@dataclass(frozen=True)
class PipelineTimes:
    """One step of the ranks that differ along `pp` alone, by their places.

    `makespan` is from the first action's begin to the last one's end; `bubble` the share of it in which ranks do not
    work on an action; `replayed` the makespan of the schedule if each action began as soon as it can and took as long
    as it did.
    """

    ranks: tuple[int, ...]
    makespan: Seconds
    busy: tuple[Seconds, ...]
    replayed: Seconds

    @property
    def bubble(self) -> float:
        """Of all ranks."""
        return 1 - sum(self.busy) / (len(self.busy) * self.makespan) if self.makespan else 0.0


def line_of(plan: Plan, rank: int) -> tuple[int, ...]:
    """The ranks of the pipeline that a rank is in, by place."""
    here = plan.topology.coordinate(rank)
    return tuple(plan.topology.rank(replace(here, pp=pp)) for pp in range(plan.topology.pp))


def pipeline_times(plan: Plan, records: Mapping[int, TimelineRecord], rank: int = 0) -> PipelineTimes:
    """The times of the pipeline that a rank is in; `records` has all its ranks. Raises ScheduleError where actions are
    missing."""
    ranks, durations = line_of(plan, rank), {}
    begins, ends, busy = [], [], []
    for member in ranks:
        own = actions_of(records[member])
        begins.append(own[0][1].begin)
        ends.append(own[-1][1].end)
        took = _durations(own)
        busy.append(Seconds(sum(took.values())))
        durations |= took
    replayed = Seconds(replay(computing_schedule_of(plan), durations).makespan)
    return PipelineTimes(ranks, Seconds(max(ends) - min(begins)), tuple(busy), replayed)


def actions_of(record: TimelineRecord) -> list[tuple[Action, Segment]]:
    """The segments that are actions of the schedule, transfers included, in order."""
    named = [(Action.from_words(segment.doing), segment) for segment in record.segments]
    return [(action, segment) for action, segment in named if action is not None]


def _durations(own: list[tuple[Action, Segment]]) -> dict[Action, float]:
    """What each action that computes kept its rank busy for, the transfers right after it included."""
    took: dict[Action, float] = {}
    last = None
    for action, segment in own:
        if action.kind.computes:
            last = action
        if last is not None:
            took[last] = took.get(last, 0.0) + segment.busy
    return took
