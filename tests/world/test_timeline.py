"""A step's times: every action of every rank, in the order and with the gaps that the simulator says."""

from __future__ import annotations

from typing import Any

import pytest
from pool import Place, Pool

from benchmarks.bubble import FIXED, SCHEDULES, TINY, plan_of, timeline_of
from shardwright.plan.pipeline import computing_schedule_of
from shardwright.plan.plan import Plan
from shardwright.plan.timeline import actions_of, pipeline_times
from shardwright.record.timeline import TimelineRecord
from shardwright.schedule.simulate import simulate

pytestmark = pytest.mark.world


STEPS = 3  # a machine may be busy with something else during one of them; a wrong order is wrong in each


def timed(place: Place, plan: Plan) -> list[dict[str, Any]]:
    return timeline_of(plan, place.mesh(plan.topology), FIXED, STEPS)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_executor_takes_what_the_simulator_says(pool: Pool, schedule: str) -> None:
    """Actions sleep instead of computing: what is left is the executor's order, and when it lets ranks go on."""
    plan = plan_of(schedule, 4, TINY, 8)
    told = pool.run(4, timed, plan)
    steps = [{r: TimelineRecord.from_json(own[step], r) for r, own in enumerate(told)} for step in range(STEPS)]
    expected = simulate(computing_schedule_of(plan), [FIXED] * len(plan.layers_per_stage))
    records = min(steps, key=lambda records: pipeline_times(plan, records).makespan)
    found = pipeline_times(plan, records)
    assert found.makespan == pytest.approx(expected.makespan, rel=0.05)
    assert found.replayed == pytest.approx(found.makespan, rel=0.05)
    assert found.bubble == pytest.approx(expected.bubble, abs=0.05)
    for rank, spans in enumerate(expected.spans):
        own = [action for action, _ in actions_of(records[rank]) if action.kind.computes]
        assert own == [span.action for span in spans]
