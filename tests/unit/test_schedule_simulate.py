"""The simulator and the pass that adds transfers, on cases reckoned by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardwright.schedule.action import Action, Kind, StageCost
from shardwright.schedule.bounds import lower_bound
from shardwright.schedule.build import REQUIRED_VIRTUAL_STAGES, build, forward_only
from shardwright.schedule.errors import ScheduleError
from shardwright.schedule.simulate import simulate, simulated_totals
from shardwright.schedule.transfers import with_transfers


def test_times_of_two_stages() -> None:
    timeline = simulate(build("1f1b", 2, 1, 2))
    spans = [[(str(span.action), span.begin, span.end) for span in spans] for spans in timeline.spans]
    assert spans == [
        [("F0@0", 0, 1), ("F1@0", 1, 2), ("B0@0", 4, 6), ("B1@0", 7, 9)],
        [("F0@1", 1, 2), ("B0@1", 2, 4), ("F1@1", 4, 5), ("B1@1", 5, 7)],
    ]
    assert timeline.makespan == 9
    assert timeline.busy == (6, 6)
    assert timeline.bubble == pytest.approx(1 / 3)
    assert timeline.live_microbatches.per_stage == timeline.live_microbatches.per_rank == (2, 1)


def test_the_order_puts_a_producer_first_even_if_it_takes_no_time() -> None:
    free = [StageCost(0, 0, 0)] * 3
    order = [str(action) for action in simulate(build("1f1b", 3, 1, 1), free).order()]
    assert order == ["F0@0", "F0@1", "F0@2", "B0@2", "B0@1", "B0@0"]


def test_a_transfer_delays_other_ranks_only() -> None:
    schedule = build("zbv", 2, 2, 1)  # stages 1 and 2 share rank 1: two of the three hand-overs cross, there and back
    assert simulate(schedule, transfer=10).makespan == simulate(schedule).makespan + 4 * 10


def test_costs_count_per_stage() -> None:
    costs = [StageCost(1, 2, 3), StageCost(10, 20, 30)]
    assert simulate(build("1f1b", 2, 1, 1), costs).makespan == 1 + 10 + 50 + 5
    assert simulate(build("zb-h1", 2, 1, 1), costs).makespan == 1 + 10 + 20 + 30
    assert lower_bound(build("zb-h1", 2, 1, 1), costs) == 1 + 10 + 20 + 30
    assert lower_bound(build("1f1b", 2, 1, 3), costs, transfer=0.5) == 1 + 0.5 + 3 * 60 + 0.5 + 5
    assert lower_bound(forward_only((0, 1), 3), costs) == 1 + 3 * 10


def test_costs_of_another_number_of_stages_are_refused() -> None:
    with pytest.raises(ScheduleError, match="costs: 3 are given for 2 stages"):
        simulate(build("1f1b", 2, 1, 1), [StageCost()] * 3)


def test_a_schedule_that_gets_stuck_is_refused() -> None:
    schedule = build("1f1b", 2, 1, 2)
    stuck = replace(schedule, actions=(schedule.actions[0], tuple(reversed(schedule.actions[1]))))
    with pytest.raises(ScheduleError, match="schedule 1f1b: rank 0 waits for ever in B0@0"):
        simulate(stuck)


def test_transfers_of_two_stages() -> None:
    moving = with_transfers(build("1f1b", 2, 1, 2), ahead=0)
    assert [" ".join(map(str, actions)) for actions in moving.actions] == [
        "F0@0 SF0@0 F1@0 SF1@0 RB0@0 B0@0 RB1@0 B1@0",
        "RF0@1 RF1@1 F0@1 B0@1 SB0@1 F1@1 B1@1 SB1@1",
    ]


def test_receives_are_posted_ahead_and_in_the_order_of_their_link() -> None:
    moving = with_transfers(build("1f1b", 2, 1, 2), ahead=2)
    assert " ".join(map(str, moving.actions[0])) == "RB0@0 F0@0 SF0@0 RB1@0 F1@0 SF1@0 B0@0 B1@0"


def test_stages_of_one_rank_exchange_no_messages() -> None:
    moving = with_transfers(build("zbv", 2, 2, 1))
    turn = {Action(Kind.SEND_OUTPUT, 1, 0), Action(Kind.SEND_GRADIENT, 2, 0)}
    assert not turn & set(moving.actions[1])
    assert with_transfers(build("interleaved", 1, 3, 4)) == build("interleaved", 1, 3, 4)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zb-h1", "zbv"])
def test_totals_and_the_beginning_are_those_of_the_timeline(name: str) -> None:
    schedule = build(name, 3, REQUIRED_VIRTUAL_STAGES[name] or 2, 7)
    costs = [StageCost(1.0 + 0.1 * stage, 2.0, 0.5) for stage in range(schedule.num_stages)]
    whole, totals = simulate(schedule, costs, transfer=0.25), simulated_totals(schedule, costs, transfer=0.25)
    assert totals.begins == tuple(spans[0].begin for spans in whole.spans)
    assert totals.ends == tuple(spans[-1].end for spans in whole.spans)
    assert totals.busy == pytest.approx(whole.busy)
    assert (totals.makespan, totals.bubble) == (whole.makespan, pytest.approx(whole.bubble))
    beginning = simulate(schedule, costs, transfer=0.25, until=9.0)
    assert beginning.spans == tuple(tuple(s for s in spans if s.begin < 9.0) for spans in whole.spans)
