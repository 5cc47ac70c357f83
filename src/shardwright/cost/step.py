"""A rank's step replayed on a tape: what its actions hold at each moment, transfers' buffers included.

Note: what is live when. A forward leaves what its blocks keep, and its output until that was sent; a backward takes it
back. How many microbatches are kept at once follows from the order of the actions alone. Between the blocks of an
action ZeRO makes parameters whole and free again, takes gradients in, and has up to two reductions under way, which
last into the next action. The replay does in the same order what parallel/zero/states.py and parallel/pipeline.py do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from shardwright.cost.activations import EmbeddingTape, HeadTape, LayerTape
from shardwright.cost.tape import Tape
from shardwright.schedule.action import Action, Kind

_IN_FLIGHT = 2
_SENDS_UNDER_WAY = 2


@dataclass(frozen=True)
class Zero:
    """How units are kept: see parallel/zero/residency.py. `direct`: collectives receive into buffers, as on CPUs."""

    shards_gradients: bool
    shards_parameters: bool
    per_microbatch: bool
    owners: int
    copies: int
    element: int
    grad_element: int
    direct: bool

    def whole(self, length: int) -> int:
        """Bytes of a unit's parameters while they are whole, where they do not rest so."""
        return length * self.element if self.shards_parameters else 0

    def gradient(self, length: int) -> int:
        """Bytes of a unit's whole gradient, where it does not rest whole."""
        return length * self.grad_element if self.shards_gradients else 0

    def received(self, length: int) -> int:
        """Bytes in which the others' shares of a gradient arrive."""
        return length // self.owners * (self.owners - 1) * self.grad_element if self.direct else 0

    def summed(self, length: int) -> int:
        """Bytes in which the other copy's share arrives; more than two copies sum in place."""
        return length // self.owners * self.grad_element if self.direct and self.copies == 2 else 0


@dataclass(frozen=True)
class Block:
    """A block's tape, and the padded lengths of the units that it is the first of its stage to use."""

    tape: EmbeddingTape | LayerTape | HeadTape
    units: tuple[int, ...]


@dataclass(frozen=True)
class StageTape:
    """A stage of the rank: its blocks in order, and the bytes of what travels between stages."""

    blocks: tuple[Block, ...]
    is_first: bool
    is_last: bool
    boundary: int


@dataclass(frozen=True)
class _Unit:
    """A unit whose reduction is under way: the block that it belongs to, by stage and place, its padded length, and
    whether it is the step's last of this unit, after which the copies are summed."""

    stage: int
    block: int
    length: int
    last: bool


_Step = tuple[Kind, int, bool]
"""An action without its microbatch: its kind, its stage, and a flag: of a forward, whether its own backward is next, so
that what it has made whole stays so; of a B or W, whether it is its stage's last."""


@dataclass(frozen=True)
class _Done:
    """What an action does to a tape, relative to its begin."""

    activations: float
    transfers: float
    peak_activations: float
    peak: float
    in_flight: tuple[_Unit, ...]
    summing: int


@dataclass
class Replay:
    """Replays a rank's actions. `stages` are those of the rank, by number; `placement` is the rank of every stage.

    `transfers`: the actions say when things are sent and received. Else what comes from another rank is there when it
    is needed, and what goes to one is gone when it has been made.
    """

    stages: dict[int, StageTape]
    zero: Zero
    placement: tuple[int, ...]
    transfers: bool = True
    tape: Tape = field(default_factory=Tape)
    _done: dict[tuple[_Step, tuple[_Unit, ...], int], _Done] = field(default_factory=dict)
    _in_flight: list[_Unit] = field(default_factory=list)
    _summing: int = 0
    """Length of the unit whose reduction has ended last, while its sum over the copies is under way."""
    _sends: dict[int, deque[int]] = field(default_factory=dict)

    @property
    def _under_way(self) -> tuple[tuple[_Unit, ...], int]:
        return tuple(self._in_flight), self._summing

    def run(self, actions: Sequence[Action]) -> Tape:
        """All actions of a step."""
        held = sum(length for stage in self.stages.values() for block in stage.blocks for length in block.units)
        if not self.zero.per_microbatch:
            self.tape.open(self.zero.whole(held) + self.zero.gradient(held))
        steps = _steps(actions)
        index, seen = 0, {}
        while index < len(steps):
            ahead = self._repeated(steps, index, seen)
            if ahead:
                index += ahead
                continue
            self._perform(steps[index])
            index += 1
        while self._in_flight:
            self._finish(self.tape, self._in_flight.pop(0))
        return self.tape

    def _repeated(self, steps: Sequence[_Step], index: int, seen: dict[Hashable, int]) -> int:
        """How many steps repeat what was done since the last moment at which as much lived: they change no peak."""
        sends = tuple((key, tuple(sizes)) for key, sizes in self._sends.items())
        state = (steps[index], self.tape.activations, self.tape.transfers, self._under_way, sends)
        before = seen.get(state)
        seen[state] = index
        if before is None:
            return 0
        period, end = index - before, index
        while end < len(steps) and steps[end] == steps[end - period]:
            end += 1
        return (end - index) // period * period

    def _transfer(self, step: _Step) -> None:
        """A receive takes memory when it is posted. A send keeps it until the second one after it is due."""
        kind, stage, _ = step
        size = self.stages[stage].boundary
        if kind.receives:
            self.tape.take(size)
            return
        to = self.placement[stage + (1 if kind is Kind.SEND_OUTPUT else -1)]
        under_way = self._sends.setdefault(to, deque())
        if len(under_way) >= _SENDS_UNDER_WAY:
            self.tape.drop(under_way.popleft())
        under_way.append(size)

    def _perform(self, step: _Step) -> None:
        """Add what an action does; alike ones are worked out once."""
        if not step[0].computes:
            self._transfer(step)
            return
        key = (step, *self._under_way)
        if key not in self._done:
            self._done[key] = self._worked_out(step)
        done, t = self._done[key], self.tape
        comes, goes = (0, 0) if self.transfers else self._implied(step)
        t.take(comes)
        t.peak_activations = max(t.peak_activations, t.activations + done.peak_activations)
        t.peak = max(t.peak, t.activations + t.transfers + done.peak)
        t.activations += done.activations
        t.transfers += done.transfers
        t.drop(goes)
        self._in_flight, self._summing = list(done.in_flight), done.summing

    def _implied(self, step: _Step) -> tuple[int, int]:
        """Bytes that an action takes from another rank, and that it gives to one."""
        kind, stage, _ = step
        if kind is Kind.WEIGHT:
            return 0, 0
        size, here = self.stages[stage].boundary, self.placement[stage]
        before = size if stage > 0 and self.placement[stage - 1] != here else 0
        after = size if stage + 1 < len(self.placement) and self.placement[stage + 1] != here else 0
        return (before, after) if kind is Kind.FORWARD else (after, before)

    def _worked_out(self, step: _Step) -> _Done:
        t, (kind, number, flag) = Tape(), step
        if kind is Kind.FORWARD:
            self._forward(t, self.stages[number], stays=flag)
        elif kind is Kind.WEIGHT:
            self._weight(t, number, last=flag)
        else:
            self._backward(t, number, last=flag, defers=kind is Kind.INPUT)
        return _Done(t.activations, t.transfers, t.peak_activations, t.peak, *self._under_way)

    def _whole(self, stage: StageTape, index: int) -> int:
        """Bytes of a block's parameters while they are whole, where they go between uses."""
        if not (0 <= index < len(stage.blocks) and self.zero.per_microbatch):
            return 0
        return sum(self.zero.whole(length) for length in stage.blocks[index].units)

    def _forward(self, t: Tape, stage: StageTape, stays: bool) -> None:
        count = len(stage.blocks)
        t.open(self._whole(stage, 0))
        for index, block in enumerate(stage.blocks):
            t.open(self._whole(stage, index + 1))
            block.tape.forward(t)
            if not (stays and index == count - 1):
                t.close(self._whole(stage, index))
        if stays:
            t.close(self._whole(stage, count - 1))  # its backward opens it again at once

    def _backward(self, t: Tape, number: int, last: bool, *, defers: bool) -> None:
        """Block by block; a block's unit is reduced when its gradients are all there."""
        stage = self.stages[number]
        t.open(self._whole(stage, len(stage.blocks) - 1))
        for index in reversed(range(len(stage.blocks))):
            block, first = stage.blocks[index], index == 0
            t.open(self._whole(stage, index - 1))
            layer = block.tape if isinstance(block.tape, LayerTape) else None
            if layer is None or not defers:
                self._take_in(t, number, index, last)
            if layer is not None:
                layer.backward(t, keeps_input=first, defers=defers)
            elif isinstance(block.tape, HeadTape):
                block.tape.backward(t, keeps_input=first)
            else:
                block.tape.backward(t)
            t.close(self._whole(stage, index))
            if layer is None or not defers:
                self._reduce(t, number, index, last)
        if not stage.is_first:
            t.drop(stage.boundary)  # the input

    def _weight(self, t: Tape, number: int, last: bool) -> None:
        blocks = self.stages[number].blocks
        for index in reversed(range(len(blocks))):
            tape = blocks[index].tape
            if isinstance(tape, LayerTape):
                self._take_in(t, number, index, last)
                tape.weights(t)
                self._reduce(t, number, index, last)

    def _take_in(self, t: Tape, number: int, index: int, last: bool) -> None:
        """A block's gradients get whole buffers, where they have none, when their last reduction has ended."""
        for unit in [u for u in self._in_flight if (u.stage, u.block) == (number, index)]:
            self._in_flight.remove(unit)
            t.close(self._scattered(unit))
        if self.zero.per_microbatch:
            t.open(sum(self.zero.gradient(length) for length in self.stages[number].blocks[index].units))

    def _reduce(self, t: Tape, number: int, index: int, last: bool) -> None:
        """Begin a block's reductions, and end the oldest of those under way."""
        zero = self.zero
        if not (last or (zero.shards_gradients and zero.per_microbatch)):
            return
        for length in self.stages[number].blocks[index].units:
            if len(self._in_flight) >= _IN_FLIGHT:
                self._finish(t, self._in_flight.pop(0))
            # With one owner there is nothing to scatter, and the sum over the copies begins at once.
            t.open(zero.summed(length) if zero.owners == 1 else zero.received(length))
            self._in_flight.append(_Unit(number, index, length, last))

    def _finish(self, t: Tape, unit: _Unit) -> None:
        """The sum over the copies goes on until the next reduction ends."""
        t.close(self._scattered(unit))
        if unit.last and self.zero.owners > 1:
            t.open(self.zero.summed(unit.length))
        t.close(self.zero.summed(self._summing))
        self._summing = unit.length if unit.last else 0

    def _scattered(self, unit: _Unit) -> int:
        """Bytes that a reduction holds until it ends."""
        return self.zero.received(unit.length) + self.zero.gradient(unit.length)


def _steps(actions: Sequence[Action]) -> list[_Step]:
    """The actions as far as they differ in what they hold."""
    steps: list[_Step] = []
    ended: set[int] = set()
    following: Action | None = None  # of those that compute
    for action in reversed(actions):
        kind, stage, flag = action.kind, action.stage, False
        if kind is Kind.FORWARD:
            flag = following is not None and _is_own_backward(following, action)
            following = action
        elif kind is Kind.INPUT:
            following = action
        elif kind is Kind.BACKWARD or kind is Kind.WEIGHT:
            flag = stage not in ended
            ended.add(stage)
            following = action
        steps.append((kind, stage, flag))
    steps.reverse()
    return steps


def _is_own_backward(following: Action, forward: Action) -> bool:
    return (
        following.microbatch == forward.microbatch
        and following.stage == forward.stage
        and following.kind in (Kind.BACKWARD, Kind.INPUT)
    )
