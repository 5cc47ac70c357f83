"""Every way in which a schedule can be wrong, each with the message that says so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from shardwright.schedule.action import Action, Kind, Schedule
from shardwright.schedule.build import build
from shardwright.schedule.errors import ScheduleError
from shardwright.schedule.transfers import with_transfers
from shardwright.schedule.validate import validate

_KINDS = {kind.value: kind for kind in Kind}


def action(text: str) -> Action:
    """The action that a text such as F0@1 names."""
    name, stage = text.split("@")
    kind = name.rstrip("0123456789")
    return Action(_KINDS[kind], int(stage), int(name[len(kind) :]))


def programs(*lines: str, name: str = "by hand", placement: Iterable[int] = (0, 1), microbatches: int = 1) -> Schedule:
    """A schedule written out, one line per rank."""
    actions = tuple(tuple(action(text) for text in line.split()) for line in lines)
    return Schedule(name, tuple(placement), microbatches, actions)


def message(schedule: Schedule) -> str:
    """What `validate` says."""
    with pytest.raises(ScheduleError) as caught:
        validate(schedule)
    return str(caught.value)


def test_an_action_on_another_stages_rank() -> None:
    assert message(programs("F0@0 F0@1 B0@1 B0@0", "")) == (
        "schedule by hand: F0@1 is on rank 0, but stage 1 lives on rank 1\n"
        "  move it there, or change the placement\n"
        "  rank 0  F0@0 [F0@1] B0@1 B0@0"
    )


def test_an_action_of_a_stage_or_microbatch_that_is_not_there() -> None:
    text = message(programs("F0@0 F1@0 B0@0", "F0@1 B0@1"))
    assert text.startswith("schedule by hand: F1@0 on rank 0, but there are 2 stages and 1 microbatches\n  remove it\n")


def test_a_placement_on_ranks_that_are_not_there() -> None:
    text = message(programs("F0@0 B0@0", placement=(0, 1)))
    assert text == (
        "schedule by hand: stages live on ranks 0 to 1, but 1 ranks have actions\n  one list of actions per rank"
    )


def test_an_action_twice() -> None:
    text = message(programs("F0@0 F0@0 B0@0", "F0@1 B0@1"))
    assert text.startswith("schedule by hand: F0@0 is done twice on rank 0\n  remove one of the two\n")


@pytest.mark.parametrize(
    ("lines", "missing"),
    [
        (("B0@0", "F0@1 B0@1"), "F0@0 is missing on rank 0"),
        (("F0@0", "F0@1 B0@1"), "B0@0 is missing on rank 0"),
        (("F0@0 I0@0 W0@0", "F0@1 I0@1"), "W0@1 is missing on rank 1"),
        (("F0@0 W0@0", "F0@1 I0@1 W0@1"), "I0@0 is missing on rank 0"),
        (("F0@0 SF0@0 RB0@0 B0@0", "RF0@1 F0@1 B0@1"), "SB0@1 is missing on rank 1"),
        (("F0@0 SF0@0 B0@0", "RF0@1 F0@1 B0@1 SB0@1"), "RB0@0 is missing on rank 0"),
    ],
)
def test_an_action_is_missing(lines: tuple[str, str], missing: str) -> None:
    text = message(programs(*lines))
    assert text.startswith(f"schedule by hand: {missing}\n  each stage and microbatch has one F, and either one B or")


@pytest.mark.parametrize(
    ("lines", "placement", "extra"),
    [
        (("F0@0 I0@0 W0@0 B0@0", "F0@1 I0@1 W0@1"), (0, 1), "B0@0 on rank 0"),
        (("F0@0 SF0@0 F0@1 B0@1 B0@0",), (0, 0), "SF0@0 on rank 0"),
    ],
)
def test_an_action_is_one_too_many(lines: tuple[str, ...], placement: tuple[int, ...], extra: str) -> None:
    assert message(programs(*lines, placement=placement)).startswith(f"schedule by hand: {extra} is one too many\n")


@pytest.mark.parametrize(
    ("lines", "problem", "way_out"),
    [
        (("B0@0 F0@0", "F0@1 B0@1"), "on rank 0, B0@0 comes before F0@0", "put F0@0 first"),
        (("F0@0 W0@0 I0@0", "F0@1 I0@1 W0@1"), "on rank 0, W0@0 comes before I0@0", "put I0@0 first"),
        (("SF0@0 F0@0 RB0@0 B0@0", "RF0@1 F0@1 B0@1 SB0@1"), "on rank 0, SF0@0 comes before F0@0", "put F0@0 first"),
        (("F0@0 SF0@0 B0@0 RB0@0", "RF0@1 F0@1 B0@1 SB0@1"), "on rank 0, B0@0 comes before RB0@0", "put RB0@0 first"),
    ],
)
def test_what_is_needed_comes_later_on_the_rank(lines: tuple[str, str], problem: str, way_out: str) -> None:
    assert message(programs(*lines)).startswith(f"schedule by hand: {problem}, which it needs\n  {way_out}\n")


def test_a_receive_out_of_the_order_of_its_link() -> None:
    good = with_transfers(build("1f1b", 2, 1, 2))
    validate(good)
    swapped = {action("RF0@1"): action("RF1@1"), action("RF1@1"): action("RF0@1")}
    bad = replace(good, actions=(good.actions[0], tuple(swapped.get(a, a) for a in good.actions[1])))
    assert message(bad) == (
        "schedule 1f1b: message 0 from rank 0 to rank 1 is SF0@0, but RF1@1 is posted for it\n"
        "  post receives in the order of the sends\n"
        "  rank 0  RB0@0 F0@0 [SF0@0] RB1@0 F1@0 SF1@0 B0@0 B1@0\n"
        "  rank 1  [RF1@1] RF0@1 F0@1 B0@1 SB0@1 F1@1 B1@1 SB1@1"
    )


def test_ranks_that_wait_for_each_others_results() -> None:
    lines = ("F0@0 B0@0 F1@0 B1@0", "F0@1 F1@1 B0@1 B1@1")
    assert message(programs(*lines, microbatches=2)) == (
        "schedule by hand: 2 of 2 ranks wait for ever:\n"
        "  rank 0 in B0@0, for B0@1 on rank 1\n"
        "  rank 1 in F1@1, for F1@0 on rank 0\n"
        "  the actions in brackets wait for each other\n"
        "  rank 0  F0@0 [B0@0] F1@0 B1@0\n"
        "  rank 1  F0@1 [F1@1] B0@1 B1@1"
    )


def test_ranks_that_send_to_each_other_before_they_post() -> None:
    """As they would run with sends that return at once, and hang as soon as a message is too large for that."""
    lines = (
        "F0@0 SF0@0 F1@0 SF1@0 RB0@0 B0@0 RB1@0 B1@0",
        "RF0@1 F0@1 B0@1 SB0@1 RF1@1 F1@1 B1@1 SB1@1",
    )
    text = message(programs(*lines, microbatches=2))
    assert "rank 0 in SF1@0, for RF1@1 on rank 1\n  rank 1 in SB0@1, for RB0@0 on rank 0\n" in text


def test_a_long_program_is_shown_around_the_fault() -> None:
    good = build("1f1b", 2, 1, 100)
    lost = replace(good, actions=(good.actions[0], good.actions[1][:100] + good.actions[1][101:]))
    lines = message(lost).splitlines()
    assert lines[0] == "schedule 1f1b: F50@1 is missing on rank 1"
    assert lines[-1].startswith("  rank 1  … ")
    assert max(map(len, lines[2:])) <= 118
