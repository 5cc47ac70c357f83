"""Schedules small enough to be written out by hand, and the errors of those that do not exist."""

from __future__ import annotations

import pytest

from shardwright.schedule.action import Schedule
from shardwright.schedule.bounds import closed_form_makespan
from shardwright.schedule.build import build, forward_only, placement
from shardwright.schedule.errors import ScheduleError


def written(schedule: Schedule) -> list[str]:
    """Each rank's actions in a line."""
    return [" ".join(map(str, actions)) for actions in schedule.actions]


def test_gpipe() -> None:
    assert written(build("gpipe", 2, 1, 3)) == [
        "F0@0 F1@0 F2@0 B0@0 B1@0 B2@0",
        "F0@1 F1@1 F2@1 B0@1 B1@1 B2@1",
    ]


def test_one_forward_one_backward() -> None:
    assert written(build("1f1b", 3, 1, 4)) == [
        "F0@0 F1@0 F2@0 B0@0 F3@0 B1@0 B2@0 B3@0",
        "F0@1 F1@1 B0@1 F2@1 B1@1 F3@1 B2@1 B3@1",
        "F0@2 B0@2 F1@2 B1@2 F2@2 B2@2 F3@2 B3@2",
    ]


def test_one_forward_one_backward_with_fewer_microbatches_than_stages() -> None:
    assert written(build("1f1b", 3, 1, 1)) == ["F0@0 B0@0", "F0@1 B0@1", "F0@2 B0@2"]


def test_interleaved() -> None:
    assert written(build("interleaved", 2, 2, 4)) == [
        "F0@0 F1@0 F0@2 F1@2 F2@0 B0@2 F3@0 B1@2 F2@2 B0@0 F3@2 B1@0 B2@2 B3@2 B2@0 B3@0",
        "F0@1 F1@1 F0@3 B0@3 F1@3 B1@3 F2@1 B0@1 F3@1 B1@1 F2@3 B2@3 F3@3 B3@3 B2@1 B3@1",
    ]


def test_interleaved_takes_the_larger_group_first() -> None:
    first_rank = written(build("interleaved", 2, 2, 5))[0].split()
    forwards = [action for action in first_rank if action.startswith("F")]
    assert " ".join(forwards) == "F0@0 F1@0 F2@0 F0@2 F1@2 F2@2 F3@0 F4@0 F3@2 F4@2"


def test_interleaved_with_one_stage_per_rank_is_one_forward_one_backward() -> None:
    assert build("interleaved", 4, 1, 6).actions == build("1f1b", 4, 1, 6).actions


def test_zb_h1_postpones_weights_by_the_stages_before() -> None:
    assert written(build("zb-h1", 3, 1, 3)) == [
        "F0@0 F1@0 F2@0 I0@0 W0@0 I1@0 W1@0 I2@0 W2@0",
        "F0@1 F1@1 I0@1 F2@1 I1@1 W0@1 I2@1 W1@1 W2@1",
        "F0@2 I0@2 F1@2 I1@2 F2@2 I2@2 W0@2 W1@2 W2@2",
    ]


def test_zbv() -> None:
    assert written(build("zbv", 2, 2, 2)) == [
        "F0@0 F1@0 F0@3 I0@3 F1@3 I1@3 I0@0 W0@3 I1@0 W1@3 W0@0 W1@0",
        "F0@1 F0@2 F1@1 F1@2 I0@2 I0@1 I1@2 I1@1 W0@2 W0@1 W1@2 W1@1",
    ]


def test_forward_only_takes_a_ranks_stages_in_order() -> None:
    assert written(forward_only(placement("zbv", 2, 2), 2)) == ["F0@0 F1@0 F0@3 F1@3", "F0@1 F1@1 F0@2 F1@2"]


def test_placements() -> None:
    assert placement("1f1b", 3, 1) == (0, 1, 2)
    assert placement("interleaved", 3, 2) == (0, 1, 2, 0, 1, 2)
    assert placement("zbv", 3, 2) == (0, 1, 2, 2, 1, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("2f2b", 2, 1, 4),
            'schedule: there is none named "2f2b"\n  those that exist: gpipe, 1f1b, interleaved, zb-h1, zbv',
        ),
        (
            ("1f1b", 2, 2, 4),
            "schedule 1f1b: 2 virtual stages per rank, but it takes exactly 1\n"
            '  virtual stages = 1, or schedule = "interleaved", which takes any number',
        ),
        (("gpipe", 0, 1, 4), "schedule gpipe: 0 ranks\n  at least 1"),
        (("interleaved", 2, 0, 4), "schedule interleaved: 0 virtual stages per rank\n  at least 1"),
        (("zbv", 2, 2, 0), "schedule zbv: 0 microbatches\n  at least 1"),
    ],
)
def test_a_schedule_that_does_not_exist_is_refused(arguments: tuple[str, int, int, int], message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        build(*arguments)
    assert str(caught.value) == message


def test_a_closed_form_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ScheduleError, match='"forward_only" has no closed form'):
        closed_form_makespan("forward_only", 2, 1, 4)
