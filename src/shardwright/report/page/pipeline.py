"""A run's pipelines, planned beside measured: who is in them, what their ranks did, and how much of it was waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shardwright.plan.pipeline import computing_schedule_of, stage_costs
from shardwright.plan.plan import Plan
from shardwright.plan.timeline import PipelineTimes, actions_of, line_of, pipeline_times
from shardwright.record.timeline import TimelineRecord
from shardwright.report.page.run import Run
from shardwright.schedule.errors import ScheduleError
from shardwright.schedule.simulate import Timeline, simulate
from shardwright.units import Seconds


@dataclass(frozen=True)
class Measured:
    """One recorded step of the ranks of one pipeline, in their order along pp. `begin` is that of the first action."""

    timelines: tuple[TimelineRecord, ...]
    times: PipelineTimes
    begin: Seconds

    @property
    def bubble(self) -> float:
        """The share of the pipeline's part of the step in which ranks do not work on an action."""
        return max(0.0, self.times.bubble)


@dataclass(frozen=True)
class Pipeline:
    """Ranks that differ along pp alone. `planned` is in seconds where a step was measured, else it takes 1."""

    label: str
    ranks: tuple[int, ...]
    planned: Timeline
    measured: Measured | None


def pipelines(run: Run) -> list[Pipeline]:
    """All pipelines with every rank's timeline here; where there is none, the first one as planned."""
    plan = run.plan
    planned = simulate(computing_schedule_of(plan), stage_costs(plan))
    found = []
    for ranks in _rank_groups(plan):
        measured = _measured(run, ranks)
        if measured is not None:
            scale = sum(measured.times.busy) / (sum(planned.busy) or 1.0)
            found.append(Pipeline(_label(plan, ranks), ranks, _scaled(planned, scale), measured))
    if found:
        return found
    first = next(iter(_rank_groups(plan)))
    return [Pipeline(_label(plan, first), first, _scaled(planned, 1 / (planned.makespan or 1.0)), None)]


def _measured(run: Run, ranks: Sequence[int]) -> Measured | None:
    """None where a rank's timeline is not here, or is of another schedule."""
    here = {rank: run.ranks[rank].timeline for rank in ranks if rank in run.ranks}
    timelines = {rank: timeline for rank, timeline in here.items() if timeline is not None and actions_of(timeline)}
    if len(timelines) < len(ranks):
        return None
    try:
        times = pipeline_times(run.plan, timelines, ranks[0])
    except ScheduleError:
        return None
    ordered = tuple(timelines[rank] for rank in ranks)
    return Measured(ordered, times, min(actions_of(timeline)[0][1].begin for timeline in ordered))


def _rank_groups(plan: Plan) -> list[tuple[int, ...]]:
    return [line_of(plan, rank) for rank in range(plan.world_size) if plan.topology.coordinate(rank).pp == 0]


def _label(plan: Plan, ranks: Sequence[int]) -> str:
    here = plan.topology.coordinate(ranks[0])
    named = ", ".join(str(rank) for rank in ranks) if len(ranks) <= 8 else f"{ranks[0]} to {ranks[-1]}"
    return f"replicate {here.replicate}, shard {here.shard}, tp {here.tp} ({'ranks' if ranks[1:] else 'rank'} {named})"


def _scaled(timeline: Timeline, scale: float) -> Timeline:
    spans = tuple(tuple(s._replace(begin=s.begin * scale, end=s.end * scale) for s in of) for of in timeline.spans)
    return replace(timeline, spans=spans)
