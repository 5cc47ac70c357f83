"""The pass that adds transfers: which rank sends what after which action, and when a receive is posted.

Note: why no rank waits for ever.
    Let G be an order of all actions that compute in which each comes after those that it needs and each rank's own
    order is kept: such as the order in which the simulator begins them. A send follows the action P that produces,
    and in the worst case waits until the receive is posted and all earlier messages of its link have arrived. A
    receive does not wait; it is posted on its rank b no later than right before the first action of b that comes
    after P in G. Go through G, and suppose that everything before P, with its sends, is over. P has its inputs: their
    producers come before it, and their messages have been sent. So P runs, and its rank comes to its sends. Rank b has
    done all its actions before P, with their sends, so it has gone on to just before its next action, and has posted
    the receive. Messages that its link sends earlier belong to actions before P: they have arrived. So the sends of P
    end too, and by induction everything does. Posting a receive earlier than that keeps the argument, which leaves
    room for two wishes: to post `ahead` actions before the use, so that a message can travel during computation; and
    to post the receives of a link in the order in which it sends, as a link carries messages in order and tells them
    apart by nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from shardwright.schedule.action import Action, Kind, Schedule, StageCost
from shardwright.schedule.dependencies import counterpart, send
from shardwright.schedule.simulate import simulate


class _Message(NamedTuple):
    """A receive, and the place among its rank's actions that compute before which it should be posted."""

    receive: Action
    position: int


def with_transfers(schedule: Schedule, costs: Sequence[StageCost] | None = None, ahead: int = 2) -> Schedule:
    """The schedule with sends right after what they send, and receives posted so that no rank waits for ever.

    Only stages on different ranks exchange messages. A receive is posted at least `ahead` actions before its use,
    earlier where that is needed to let the sender go on. `costs` decide in which order ranks are expected to come to
    their actions; the result is correct whatever they are. Raises ScheduleError if the schedule itself gets stuck.
    """
    links, sends = _messages(schedule, simulate(schedule, costs).order(), ahead)
    posts: list[dict[int, list[Action]]] = [{} for _ in schedule.actions]
    for (_, receiver), messages in sorted(links.items()):
        for position, message in zip(_kept_in_order(messages), messages, strict=True):
            posts[receiver].setdefault(position, []).append(message.receive)
    programs = []
    for rank, actions in enumerate(schedule.actions):
        program: list[Action] = []
        for position, action in enumerate(action for action in actions if action.kind.computes):
            program += posts[rank].get(position, [])
            program.append(action)
            if position in sends[rank]:
                program.append(sends[rank][position])
        programs.append(tuple(program))
    return replace(schedule, actions=tuple(programs))


def _messages(
    schedule: Schedule, order: Sequence[Action], ahead: int
) -> tuple[dict[tuple[int, int], list[_Message]], list[dict[int, Action]]]:
    """Per link (sender, receiver) its messages in sending order, and per rank its sends by the action they follow."""
    placement, uses = schedule.placement, _uses(schedule)
    begun = [0] * schedule.num_ranks  # how many actions of each rank come before this one in the order
    links: dict[tuple[int, int], list[_Message]] = {}
    sends: list[dict[int, Action]] = [{} for _ in schedule.actions]
    for action in order:
        sender = placement[action.stage]
        position, begun[sender] = begun[sender], begun[sender] + 1
        sent = send(action.kind, action.stage, action.microbatch, placement)
        if sent is None:
            continue
        received = counterpart(sent)
        receiver = placement[received.stage]
        use = uses[received.kind, received.stage][received.microbatch]
        latest = min(begun[receiver], max(0, use - ahead))
        links.setdefault((sender, receiver), []).append(_Message(received, latest))
        sends[sender][position] = sent
    return links, sends


def _uses(schedule: Schedule) -> dict[tuple[Kind, int], dict[int, int]]:
    """For each kind of receive and stage, by microbatch, the place among its rank's actions of the one that uses it."""
    uses = {(kind, s): {} for kind in (Kind.RECEIVE_INPUT, Kind.RECEIVE_GRADIENT) for s in range(schedule.num_stages)}
    for actions in schedule.actions:
        computing = (action for action in actions if action.kind.computes)
        for position, action in enumerate(computing):
            if action.kind is not Kind.WEIGHT:
                kind = Kind.RECEIVE_INPUT if action.kind is Kind.FORWARD else Kind.RECEIVE_GRADIENT
                uses[kind, action.stage][action.microbatch] = position
    return uses


def _kept_in_order(messages: Sequence[_Message]) -> list[int]:
    """Positions no later than each message's own, and never later than that of a message sent after it."""
    positions = [message.position for message in messages]
    for index in reversed(range(len(positions) - 1)):
        positions[index] = min(positions[index], positions[index + 1])
    return positions
