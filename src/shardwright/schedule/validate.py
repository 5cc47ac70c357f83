"""Whether a schedule is one: complete, in order, its messages matched, and no rank waiting for ever."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, NoReturn

from shardwright.schedule.action import Action, Kind, Schedule
from shardwright.schedule.dependencies import counterpart, needs, peer, send
from shardwright.schedule.errors import ScheduleError
from shardwright.schedule.grid import draw_programs
from shardwright.schedule.rendezvous import stuck

_MOST_RANKS_SHOWN = 16


class _Place(NamedTuple):
    rank: int
    position: int


def validate(schedule: Schedule) -> None:
    """Raise ScheduleError unless the schedule would run and compute everything once.

    Every stage and microbatch has one F and, unless there are only Fs, one B, or one I and one W; each on the stage's
    rank and after what it needs. If there are transfers, each message between two ranks is sent once, after what
    computes it, and received once, before what uses it; each link receives in the order in which it sends; and no rank
    waits for ever even if every send waits for its receiver.
    """
    places = _places(schedule)
    _check_complete(schedule, places)
    _check_order(schedule, places)
    _check_links(schedule)
    _check_ends(schedule)


def _places(schedule: Schedule) -> dict[Action, _Place]:
    """Where each action is. Raises ScheduleError for one on another stage's rank, or done twice."""
    places: dict[Action, _Place] = {}
    placement = schedule.placement
    if not set(placement) <= set(range(schedule.num_ranks)):
        problem = f"stages live on ranks 0 to {max(placement)}, but {schedule.num_ranks} ranks have actions"
        _refuse(schedule, problem, "one list of actions per rank", {})
    for rank, actions in enumerate(schedule.actions):
        for index, action in enumerate(actions):
            if not (0 <= action.stage < len(placement) and 0 <= action.microbatch < schedule.num_microbatches):
                sizes = f"{len(placement)} stages and {schedule.num_microbatches} microbatches"
                _refuse(schedule, f"{action} on rank {rank}, but there are {sizes}", "remove it", {rank: index})
            if placement[action.stage] != rank:
                problem = (
                    f"{action} is on rank {rank}, but stage {action.stage} lives on rank {placement[action.stage]}"
                )
                _refuse(schedule, problem, "move it there, or change the placement", {rank: index})
            if action in places:
                _refuse(schedule, f"{action} is done twice on rank {rank}", "remove one of the two", {rank: index})
            places[action] = _Place(rank, index)
    return places


def _check_complete(schedule: Schedule, places: Mapping[Action, _Place]) -> None:
    kinds = {action.kind for action in places}
    has_transfers = any(not kind.computes for kind in kinds)
    expected = set()
    for action in _expected_work(schedule, kinds):
        expected.add(action)
        moved = send(action.kind, action.stage, action.microbatch, schedule.placement)
        if moved is not None and has_transfers:
            expected |= {moved, counterpart(moved)}
    for action in sorted(expected - places.keys(), key=_by_microbatch):
        rank = schedule.placement[action.stage]
        around = {rank: len(schedule.actions[rank])}
        _refuse(schedule, f"{action} is missing on rank {rank}", _COMPLETE, around)
    for action in sorted(places.keys() - expected, key=_by_microbatch):
        rank, index = places[action]
        _refuse(schedule, f"{action} on rank {rank} is one too many", _COMPLETE, {rank: index})


_COMPLETE = (
    "each stage and microbatch has one F, and either one B or, in all of a schedule, one I and one W; "
    "each message between two ranks one send and one receive"
)


def _expected_work(schedule: Schedule, kinds: set[Kind]) -> Iterator[Action]:
    """What must be computed, given the kinds of action that the schedule has."""
    backward = [Kind.INPUT, Kind.WEIGHT] if kinds & {Kind.INPUT, Kind.WEIGHT} else kinds & {Kind.BACKWARD}
    for kind in (Kind.FORWARD, *backward):
        for stage in range(schedule.num_stages):
            for microbatch in range(schedule.num_microbatches):
                yield Action(kind, stage, microbatch)


def _by_microbatch(action: Action) -> tuple[int, int, str]:
    return action.microbatch, action.stage, action.kind


def _check_order(schedule: Schedule, places: Mapping[Action, _Place]) -> None:
    """What is needed on the same rank comes first: results, and for a transfer the action that it serves."""
    backward = Kind.INPUT if schedule.splits_backward else Kind.BACKWARD
    for action, (rank, index) in places.items():
        for first, second in _pairs_in_order(action, schedule.placement, backward):
            if first in places and second in places and places[first].position > places[second].position:
                problem = f"on rank {rank}, {second} comes before {first}, which it needs"
                _refuse(schedule, problem, f"put {first} first", {rank: index})


def _pairs_in_order(action: Action, placement: Sequence[int], backward: Kind) -> Iterator[tuple[Action, Action]]:
    """Pairs of actions of one rank, the first of which the second needs."""
    stage, microbatch = action.stage, action.microbatch
    if action.kind.computes:
        for kind, needed in needs(action.kind, stage, len(placement)):
            if placement[needed] == placement[stage]:
                yield Action(Kind.FORWARD if kind is Kind.FORWARD else backward, needed, microbatch), action
        return
    forward = action.kind in (Kind.SEND_OUTPUT, Kind.RECEIVE_INPUT)
    served = Action(Kind.FORWARD if forward else backward, stage, microbatch)
    yield (served, action) if action.kind.sends else (action, served)


def _check_links(schedule: Schedule) -> None:
    """Each link receives in the order in which it sends."""
    sent: dict[tuple[int, int], list[_Place]] = {}
    received: dict[tuple[int, int], list[_Place]] = {}
    for rank, actions in enumerate(schedule.actions):
        for index, action in enumerate(actions):
            if action.kind.sends:
                sent.setdefault((rank, peer(action, schedule.placement)), []).append(_Place(rank, index))
            elif action.kind.receives:
                received.setdefault((peer(action, schedule.placement), rank), []).append(_Place(rank, index))
    for link, sends in sent.items():
        for number, (sender, receiver) in enumerate(zip(sends, received[link], strict=True)):
            send_action = schedule.actions[sender.rank][sender.position]
            receive_action = schedule.actions[receiver.rank][receiver.position]
            if counterpart(send_action) != receive_action:
                problem = (
                    f"message {number} from rank {link[0]} to rank {link[1]} is {send_action}, but {receive_action}"
                )
                around = {sender.rank: sender.position, receiver.rank: receiver.position}
                _refuse(schedule, f"{problem} is posted for it", "post receives in the order of the sends", around)


def _check_ends(schedule: Schedule) -> None:
    """No rank waits for ever."""
    waits = stuck(schedule)
    if waits:
        problem = f"{len(waits)} of {schedule.num_ranks} ranks wait for ever:"
        for wait in waits:
            rank = schedule.placement[wait.awaited.stage]
            problem += f"\n  rank {wait.rank} in {wait.action}, for {wait.awaited} on rank {rank}"
        _refuse(schedule, problem, "the actions in brackets wait for each other", {w.rank: w.position for w in waits})


def _refuse(schedule: Schedule, problem: str, way_out: str, around: Mapping[int, int]) -> NoReturn:
    """Raise with the ranks concerned drawn around the actions concerned."""
    shown = dict(sorted(around.items())[:_MOST_RANKS_SHOWN])
    lines = [way_out, *draw_programs(schedule, shown)]
    raise ScheduleError(f"schedule {schedule.name}: {problem}", "\n  ".join(lines))
