"""Schedules by the thousand: complete, in order, free of deadlock, as short and as small as their papers say."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shardwright.schedule.action import Action, Kind, Schedule, StageCost
from shardwright.schedule.bounds import closed_form_makespan, ideal_bubble, lower_bound
from shardwright.schedule.build import build, forward_only, placement
from shardwright.schedule.errors import ScheduleError
from shardwright.schedule.simulate import live_microbatches, simulate
from shardwright.schedule.transfers import with_transfers
from shardwright.schedule.validate import validate

# (name, stages per rank), each of which meets every number of ranks and microbatches below.
SHAPES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 1), ("interleaved", 2), ("interleaved", 3), ("interleaved", 5)]
SHAPES += [("zb-h1", 1), ("zbv", 2)]
by_shape = pytest.mark.parametrize(("name", "virtual_stages"), SHAPES)

RANKS = (1, 2, 3, 4, 5, 7, 8, 12)
MICROBATCHES = (*range(1, 18), 24, 25, 31)

cost = st.sampled_from([0.0, 0.25, 1.0, 1.5, 4.0])
stage_cost = st.builds(StageCost, cost, cost, cost)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, list[StageCost]]:
    """A named schedule, or its forwards alone, and what each stage costs."""
    name, virtual_stages = draw(st.sampled_from(SHAPES))
    num_ranks, num_microbatches = draw(st.integers(1, 6)), draw(st.integers(1, 14))
    schedule = build(name, num_ranks, virtual_stages, num_microbatches)
    if draw(st.integers(0, 5)) == 0:
        schedule = forward_only(schedule.placement, num_microbatches)
    count = schedule.num_stages
    return schedule, draw(st.lists(stage_cost, min_size=count, max_size=count))


@by_shape
def test_makespan_is_the_closed_form_and_no_worse_than_one_forward_one_backward(name: str, virtual_stages: int) -> None:
    for num_ranks in RANKS:
        for num_microbatches in MICROBATCHES:
            timeline = simulate(build(name, num_ranks, virtual_stages, num_microbatches))
            numbers = (num_ranks, virtual_stages, num_microbatches)
            assert timeline.makespan == closed_form_makespan(name, *numbers), numbers
            assert timeline.makespan >= lower_bound(timeline.schedule), numbers
            assert timeline.bubble == pytest.approx(ideal_bubble(name, *numbers)), numbers
            assert timeline.bubble <= ideal_bubble("1f1b", num_ranks, 1, num_microbatches) + 1e-12, numbers


@by_shape
def test_with_a_microbatch_per_rank_no_schedule_could_be_shorter(name: str, virtual_stages: int) -> None:
    for num_ranks in RANKS:
        for num_microbatches in range(num_ranks, 2 * num_ranks + 2):
            schedule = build(name, num_ranks, virtual_stages, num_microbatches)
            assert simulate(schedule).makespan == lower_bound(schedule)


@by_shape
def test_every_schedule_is_valid_with_transfers_and_without(name: str, virtual_stages: int) -> None:
    for num_ranks in (1, 2, 3, 4, 6):
        for num_microbatches in (1, 2, 3, 4, 5, 6, 7, 9, 13):
            schedule = build(name, num_ranks, virtual_stages, num_microbatches)
            validate(schedule)
            for ahead in (0, 2):
                validate(with_transfers(schedule, ahead=ahead))


@by_shape
def test_evaluation_is_valid_on_every_placement(name: str, virtual_stages: int) -> None:
    for num_ranks in (1, 2, 3, 5):
        for num_microbatches in (1, 2, 5):
            schedule = forward_only(placement(name, num_ranks, virtual_stages), num_microbatches)
            validate(with_transfers(schedule))
            assert lower_bound(schedule) <= simulate(schedule).makespan


def test_live_microbatches_keep_to_their_limits() -> None:
    for num_ranks in RANKS:
        for num_microbatches in MICROBATCHES:
            live = live_microbatches(build("1f1b", num_ranks, 1, num_microbatches)).per_stage
            assert live == tuple(min(num_ranks - stage, num_microbatches) for stage in range(num_ranks))
            gpipe = live_microbatches(build("gpipe", num_ranks, 1, num_microbatches)).per_stage
            assert gpipe == (num_microbatches,) * num_ranks
            for name, virtual_stages in (("zb-h1", 1), ("zbv", 2)):
                live = live_microbatches(build(name, num_ranks, virtual_stages, num_microbatches)).per_rank
                assert max(live) <= virtual_stages * num_ranks


@given(schedules(), st.sampled_from([0.0, 0.1, 2.0]), st.integers(0, 4))
@settings(max_examples=200, deadline=None)
def test_whatever_the_costs_a_schedule_with_transfers_is_valid_and_above_the_bound(
    drawn: tuple[Schedule, list[StageCost]], transfer: float, ahead: int
) -> None:
    schedule, costs = drawn
    timeline = simulate(schedule, costs, transfer)
    assert timeline.makespan >= lower_bound(schedule, costs, transfer) - 1e-9
    moving = with_transfers(schedule, costs, ahead)
    validate(moving)
    assert simulate(moving, costs, transfer).spans == timeline.spans
    work = sum(costs[action.stage].of(action.kind) for actions in schedule.actions for action in actions)
    assert sum(timeline.busy) == pytest.approx(work)


@given(schedules())
@settings(max_examples=120, deadline=None)
def test_the_global_order_is_an_order(drawn: tuple[Schedule, list[StageCost]]) -> None:
    schedule, costs = drawn
    order = simulate(schedule, costs).order()
    for rank, actions in enumerate(schedule.actions):
        assert tuple(action for action in order if schedule.placement[action.stage] == rank) == actions
    one_by_one = replace(schedule, placement=(0,) * schedule.num_stages, actions=(tuple(order),))
    validate(one_by_one)  # one rank does it all in that order: what is needed comes first


@given(schedules(), st.data())
@settings(max_examples=120, deadline=None)
def test_losing_or_repeating_any_action_is_found(drawn: tuple[Schedule, list[StageCost]], data: st.DataObject) -> None:
    schedule = with_transfers(drawn[0])
    assume(schedule.num_stages * schedule.num_microbatches > 1)  # a lone F without its B is an evaluation
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    program = list(schedule.actions[rank])
    index = data.draw(st.integers(0, len(program) - 1))
    program[index : index + 1] = [program[index]] * data.draw(st.sampled_from([0, 2]))
    with pytest.raises(ScheduleError):
        validate(with_program(schedule, rank, program))


@given(schedules(), st.data())
@settings(max_examples=250, deadline=None)
def test_moving_an_action_is_refused_just_when_it_would_not_run(
    drawn: tuple[Schedule, list[StageCost]], data: st.DataObject
) -> None:
    schedule = with_transfers(drawn[0]) if data.draw(st.booleans()) else drawn[0]
    for _ in range(data.draw(st.integers(1, 2))):
        rank = data.draw(st.integers(0, schedule.num_ranks - 1))
        program = list(schedule.actions[rank])
        moved = program.pop(data.draw(st.integers(0, len(program) - 1)))
        program.insert(data.draw(st.integers(0, len(program))), moved)
        schedule = with_program(schedule, rank, program)
    if runs(schedule):
        validate(schedule)
    else:
        with pytest.raises(ScheduleError):
            validate(schedule)


def with_program(schedule: Schedule, rank: int, program: list[Action]) -> Schedule:
    """The schedule with another program on one rank."""
    actions = (*schedule.actions[:rank], tuple(program), *schedule.actions[rank + 1 :])
    return replace(schedule, actions=actions)


def runs(schedule: Schedule) -> bool:
    """Whether a complete schedule runs, found by running it."""
    ranks = PlainRanks(schedule)
    going = True
    while going:
        going = any([ranks.advance(rank) for rank in range(schedule.num_ranks)])
    return all(at == len(actions) for at, actions in zip(ranks.at, schedule.actions, strict=True))


class PlainRanks:
    """Ranks that hold named tensors, and links that are queues of posted receives.

    Written without the package's own dependencies and matching, and as slow as it is plain. A tensor is (name, stage,
    microbatch): "x" is the input of F, "dx" the gradient that B starts from, "f" and "i" what F and I leave behind.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.moving = any(action.kind.sends for actions in schedule.actions for action in actions)
        self.held: list[set[tuple[str, int, int]]] = [set() for _ in schedule.actions]
        self.posted: dict[tuple[int, int], deque[tuple[str, int, int]]] = defaultdict(deque)
        self.at = [0] * schedule.num_ranks
        for j in range(schedule.num_microbatches):
            self.held[schedule.placement[0]].add(("x", 0, j))
            self.held[schedule.placement[-1]].add(("dx", schedule.num_stages - 1, j))

    def advance(self, rank: int) -> bool:
        """Do all that a rank can do now; whether that was anything."""
        begin, actions = self.at[rank], self.schedule.actions[rank]
        while self.at[rank] < len(actions) and self.can_do(rank, actions[self.at[rank]]):
            self.at[rank] += 1
        return self.at[rank] > begin

    def can_do(self, rank: int, action: Action) -> bool:
        """Do an action, if it can be done."""
        home, s, j = self.schedule.placement, action.stage, action.microbatch
        match action.kind:
            case Kind.RECEIVE_INPUT:
                self.posted[home[s - 1], rank].append(("x", s, j))
            case Kind.RECEIVE_GRADIENT:
                self.posted[home[s + 1], rank].append(("dx", s, j))
            case Kind.SEND_OUTPUT:
                return self.can_send(rank, ("x", s + 1, j))
            case Kind.SEND_GRADIENT:
                return self.can_send(rank, ("dx", s - 1, j))
            case Kind.FORWARD:
                return self.can_compute(rank, [("x", s, j)], [("f", s, j), ("x", s + 1, j)])
            case Kind.WEIGHT:
                return self.can_compute(rank, [("i", s, j)], [])
            case _:
                return self.can_compute(rank, [("f", s, j), ("dx", s, j)], [("i", s, j), ("dx", s - 1, j)])
        return True

    def can_send(self, rank: int, tensor: tuple[str, int, int]) -> bool:
        """Send a tensor that is here, if the next receive posted on the link is for it."""
        receiver = self.schedule.placement[tensor[1]]
        link = self.posted[rank, receiver]
        if tensor not in self.held[rank] or not link or link[0] != tensor:
            return False
        self.held[receiver].add(link.popleft())
        return True

    def can_compute(self, rank: int, needed: list[tuple[str, int, int]], given: list[tuple[str, int, int]]) -> bool:
        """Compute, if what is needed is here. Without transfers, what is given appears on the rank of its stage."""
        if not self.held[rank].issuperset(needed):
            return False
        for tensor in given:
            away = 0 <= tensor[1] < self.schedule.num_stages and not self.moving
            self.held[self.schedule.placement[tensor[1]] if away else rank].add(tensor)
        return True
