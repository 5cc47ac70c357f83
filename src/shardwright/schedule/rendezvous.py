"""Whether the ranks of a schedule come to their ends if every send waits for its receiver."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from shardwright.schedule.action import Action, Kind, Schedule
from shardwright.schedule.dependencies import counterpart, needs, send


@dataclass(frozen=True)
class Wait:
    """A rank that cannot go on: the index and the action that it stands at, and what that waits for."""

    rank: int
    position: int
    action: Action
    awaited: Action


def stuck(schedule: Schedule) -> list[Wait]:
    """The ranks that never come to their end, with what they wait for; none if all do.

    A send waits until its receive is posted. That all earlier messages of its link have been received needs no
    check: their sends come before it on the same rank, and have waited themselves. A receive does not wait; what uses
    its data waits for the send to end. A schedule without transfers hands results over as soon as they are computed.
    """
    run = _Run(schedule, any(action.kind.sends for actions in schedule.actions for action in actions))
    ready = deque(range(schedule.num_ranks))
    while ready:
        ready.extend(run.advance(ready.popleft()))
    waits = []
    for rank, (position, actions) in enumerate(zip(run.positions, schedule.actions, strict=True)):
        if position < len(actions):
            awaited = next(needed for needed in run.awaited_by(actions[position]) if needed not in run.done)
            waits.append(Wait(rank, position, actions[position], awaited))
    return waits


@dataclass
class _Run:
    schedule: Schedule
    has_transfers: bool
    done: set[Action] = field(default_factory=set)  # computed, sent, or posted
    waiting: dict[Action, list[int]] = field(default_factory=dict)
    positions: list[int] = field(init=False)
    backward: Kind = field(init=False)

    def __post_init__(self) -> None:
        self.positions = [0] * self.schedule.num_ranks
        self.backward = Kind.INPUT if self.schedule.splits_backward else Kind.BACKWARD

    def awaited_by(self, action: Action) -> list[Action]:
        """The actions that must have ended, or been posted, before this one can end."""
        if action.kind.receives:
            return []
        if action.kind.sends:
            return [counterpart(action)]
        awaited, placement = [], self.schedule.placement
        for kind, stage in needs(action.kind, action.stage, len(placement)):
            producer = Action(Kind.FORWARD if kind is Kind.FORWARD else self.backward, stage, action.microbatch)
            moved = send(producer.kind, stage, action.microbatch, placement) if stage != action.stage else None
            awaited.append(moved if moved is not None and self.has_transfers else producer)
        return awaited

    def advance(self, rank: int) -> list[int]:
        """Go on with a rank until it waits or ends; gives the ranks that waited for what it did."""
        actions, woken = self.schedule.actions[rank], []
        while self.positions[rank] < len(actions):
            action = actions[self.positions[rank]]
            for awaited in self.awaited_by(action):
                if awaited not in self.done:
                    self.waiting.setdefault(awaited, []).append(rank)
                    return woken
            self.done.add(action)
            self.positions[rank] += 1
            woken += self.waiting.pop(action, ())
        return woken
