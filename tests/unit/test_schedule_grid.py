"""Schedules as text."""

from __future__ import annotations

from shardwright.schedule.action import Kind, StageCost
from shardwright.schedule.build import build
from shardwright.schedule.grid import draw, grid
from shardwright.schedule.simulate import simulate


def test_one_stage_per_rank() -> None:
    assert draw(build("1f1b", 2, 1, 3)) == [
        "time    0              5              10",
        "rank 0  F0 F1 ·  ·  B0─── F2 B1─── ·  B2───",
        "rank 1  ·  F0 B0─── F1 B1─── F2 B2─── ·  ·",
        "F forward   B backward   · idle",
    ]


def test_several_stages_per_rank_and_a_split_backward() -> None:
    assert draw(build("zbv", 2, 2, 1)) == [
        "time    0                   5",
        "rank 0  F0a ·   ·   F0b I0b W0b ·   I0a W0a",
        "rank 1  ·   F0a F0b ·   ·   I0b I0a W0b W0a",
        "F forward   I input gradient   W weight gradient   · idle   a to b: the stages of a rank",
    ]


def test_a_grid_too_wide_is_cut_and_says_so() -> None:
    lines = draw(build("1f1b", 2, 1, 12), width=40)
    assert lines[1:3] == [
        "rank 0  F0  F1  ·   ·   B0───── F2  …",
        "rank 1  ·   F0  B0───── F1  B1───── …",
    ]
    assert lines[-1] == "… 32 of 39 units of time are not shown"
    assert max(map(len, lines)) <= 40


def test_cells_carry_kinds_and_fill_their_rows() -> None:
    drawn = grid(build("zb-h1", 3, 1, 4))
    assert [cell.kind for cell in drawn.rows[2].cells][:4] == [None, Kind.FORWARD, Kind.INPUT, Kind.FORWARD]
    assert len({sum(len(cell.text) for cell in row.cells) for row in drawn.rows}) == 1
    assert [str(row) for row in drawn.rows] == drawn.lines()[1:4]


def test_a_timeline_is_drawn_in_units_of_time() -> None:
    timeline = simulate(build("1f1b", 1, 1, 1), [StageCost(2.0, 1.0, 3.0)])
    assert draw(timeline, unit=2.0) == ["time    0", "rank 0  F0 B0───", "F forward   B backward   · idle"]


def test_of_a_long_timeline_the_beginning_is_enough() -> None:
    schedule = build("1f1b", 4, 1, 9)
    whole = grid(schedule, width=50)
    beginning = grid(simulate(schedule, until=50 / 3), width=50, makespan=simulate(schedule).makespan)
    assert beginning.lines() == whole.lines()
