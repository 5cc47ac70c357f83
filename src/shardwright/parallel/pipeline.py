"""Pipeline parallelism: the one executor, which runs a rank's actions of any schedule in their order.

Note: what is kept between the actions of a microbatch. A forward leaves autograd's graph, its input, and nothing of its
output: the backward starts at the output's edge in the graph, which needs no values, so the memory is free as soon as
the output has been sent. A backward leaves the gradient of the input. Sends are waited for when the second one after
them on the same link is due, so that two of them at most hold their memory; the schedule's validator proves that no
rank would wait for ever even if each send had to be waited for at once.

Note: a rehearsal on GPUs. CUDA loads a kernel when it is first launched, and may wait for all running kernels before it
does. A receive that was posted ahead is a running kernel, which ends only when the sender has sent; so two ranks that
each load a kernel under a receive could wait for each other for ever. Before its first transfer each rank therefore
runs its stages once on made-up inputs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from shardwright.comm.collectives import Handle
from shardwright.comm.line import Line, receive, send
from shardwright.parallel.stage import Boundary, Stage
from shardwright.parallel.zero.passage import Passage
from shardwright.parallel.zero.states import States
from shardwright.schedule.action import Action, Kind, Schedule

Microbatch = tuple[Tensor, Tensor]
"""Tokens and targets."""

_SENDS_UNDER_WAY = 2


@dataclass(frozen=True)
class Program:
    """Where each stage lives, and the schedule for a number of microbatches: of a step, and of an evaluation."""

    placement: tuple[int, ...]
    step: Callable[[int], Schedule]
    evaluation: Callable[[int], Schedule]


@dataclass
class Pipeline:
    """Runs microbatches through the stages of this rank.

    `between` is called after every microbatch's backward but the last, when only what rests between them is in memory;
    the memory ledger reads there.
    """

    stages: Mapping[int, Stage]
    states: States
    line: Line
    program: Program
    boundary: Boundary
    between: Callable[[], None] | None = None
    _rehearsed: bool = field(default=False, init=False)

    def run(self, microbatches: Sequence[Microbatch], scale: Tensor) -> Tensor:
        """Forward and backward of each (tokens, targets); the sum of the losses times `scale`, a detached scalar.

        It is zero on ranks that do not have the last stage.
        """
        self._rehearse_on_gpu(microbatches)
        self.states.begin_step(len(microbatches))
        actions = self.program.step(len(microbatches)).actions[self.line.index]
        execution = Execution(self, microbatches, scale)
        left = sum(action.kind in (Kind.BACKWARD, Kind.WEIGHT) for action in actions)
        for index, action in enumerate(actions):
            following = _following(actions, index) if action.kind.computes else None
            execution.perform(action, stays=_is_backward_of(following, action))
            if action.kind in (Kind.BACKWARD, Kind.WEIGHT):
                left -= 1
                if left and self.between is not None:
                    self.states.settle()
                    self.between()
            if following is not None and following.kind is not Kind.WEIGHT:
                # What it needs first is gathered while its input is waited for.
                self.states.prefetch(following.stage, backward=following.kind is not Kind.FORWARD)
        execution.finish()
        return execution.total

    def evaluate(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """The sum of the losses of each (tokens, targets), fp64, without gradients; zero as `run`'s."""
        self._rehearse_on_gpu(microbatches)
        execution = Execution(self, microbatches, torch.ones_like(self._zero()))
        with torch.no_grad():
            for action in self.program.evaluation(len(microbatches)).actions[self.line.index]:
                execution.perform(action)
        execution.finish()
        return execution.total

    def rehearse(self, microbatch: Microbatch, *, halves: bool) -> None:
        """What a step and an evaluation do on this rank's stages, from zeros, without the pipeline's transfers.

        The microbatch runs twice, because a second gradient is added where a first is written. The gradients are of no
        use: a step forgets them when it begins.
        """
        backward = (Kind.INPUT, Kind.WEIGHT) if halves else (Kind.BACKWARD,)
        self.states.begin_step(2)
        for _ in range(2):
            for number in self.stages:
                execution = Execution(self, [microbatch], torch.ones_like(self._zero()))
                execution.make_up(number)
                for kind in (Kind.FORWARD, *backward):
                    execution.perform(Action(kind, number, 0))
        self.states.collect_gradients()
        with torch.no_grad():
            for number in self.stages:
                execution = Execution(self, [microbatch], torch.ones_like(self._zero()))
                execution.make_up(number)
                execution.perform(Action(Kind.FORWARD, number, 0))

    def _rehearse_on_gpu(self, microbatches: Sequence[Microbatch]) -> None:
        """See the note."""
        if self.boundary.device.type == "cuda" and self.line.axis.degree > 1 and not self._rehearsed:
            schedule = self.program.step(len(microbatches))
            with torch.enable_grad():
                self.rehearse(microbatches[0], halves=schedule.splits_backward)
            torch.cuda.synchronize(self.boundary.device)
        self._rehearsed = True

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.boundary.device)


def _following(actions: Sequence[Action], index: int) -> Action | None:
    """The next action that computes."""
    return next((actions[i] for i in range(index + 1, len(actions)) if actions[i].kind.computes), None)


def _is_backward_of(following: Action | None, action: Action) -> bool:
    """Whether an action is the backward, or its first half, of the forward that goes before it."""
    return following is not None and (
        (following.stage, following.microbatch) == (action.stage, action.microbatch)
        and following.kind in (Kind.BACKWARD, Kind.INPUT)
    )


@dataclass
class _Kept:
    """What the forward of a microbatch leaves for its backward."""

    passage: Passage
    input: Tensor
    output: GradientEdge


@dataclass
class Execution:
    """One run of a rank's actions over some microbatches. Keys are (stage, microbatch)."""

    pipeline: Pipeline
    microbatches: Sequence[Microbatch]
    scale: Tensor
    total: Tensor = field(init=False)
    _kept: dict[tuple[int, int], _Kept] = field(default_factory=dict)
    _halves: dict[tuple[int, int], Passage] = field(default_factory=dict)
    _inputs: dict[tuple[int, int], tuple[Tensor, Handle | None]] = field(default_factory=dict)
    _gradients: dict[tuple[int, int], tuple[Tensor, Handle | None]] = field(default_factory=dict)
    _sends: dict[int, deque[Handle]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.float64, device=self.pipeline.boundary.device)

    @cached_property
    def _perform(self) -> dict[Kind, Callable[[int, int], None]]:
        return {
            Kind.BACKWARD: self._backward,
            Kind.INPUT: self._input_gradient,
            Kind.WEIGHT: self._weight_gradient,
            Kind.SEND_OUTPUT: self._send_output,
            Kind.SEND_GRADIENT: self._send_gradient,
            Kind.RECEIVE_INPUT: self._receive_input,
            Kind.RECEIVE_GRADIENT: self._receive_gradient,
        }

    def perform(self, action: Action, *, stays: bool = False) -> None:
        """Do one action. `stays`: what follows a forward is its own backward."""
        self.pipeline.line.axis.ledger.whereabouts.begin(action.in_words)
        if action.kind is Kind.FORWARD:
            self._forward(action.stage, action.microbatch, stays)
        else:
            self._perform[action.kind](action.stage, action.microbatch)

    def make_up(self, stage: int) -> None:
        """Put zeros in the place of what the first microbatch of a stage would receive."""
        zeros = self.pipeline.boundary.empty(self.microbatches[0][0]).zero_()
        self._inputs[stage, 0], self._gradients[stage, 0] = (zeros, None), (zeros.clone(), None)

    def finish(self) -> None:
        """Wait for the sends that are still under way."""
        for handles in self._sends.values():
            for handle in handles:
                handle.wait()
        self._sends = {}

    def _forward(self, number: int, microbatch: int, stays: bool) -> None:
        stage, (tokens, targets) = self.pipeline.stages[number], self.microbatches[microbatch]
        if stage.is_first:
            x = tokens
        else:
            x = _arrived(self._inputs.pop((number, microbatch)))
            x.requires_grad_(torch.is_grad_enabled())
        with self.pipeline.states.forward(number, stays=stays) as passage:
            y = stage(x, targets)
        if stage.is_last:
            y = y * self.scale
            self.total += y.detach()
        if torch.is_grad_enabled():
            self._kept[number, microbatch] = _Kept(passage, x, get_gradient_edge(y))
        if not stage.is_last:
            self.pipeline.boundary.check(y, stage, tokens)
            self._inputs[number + 1, microbatch] = (y.detach(), None)

    def _backward(self, number: int, microbatch: int) -> None:
        kept = self._kept.pop((number, microbatch))
        with self.pipeline.states.backward(kept.passage):
            self._differentiate(number, microbatch, kept)

    def _input_gradient(self, number: int, microbatch: int) -> None:
        kept = self._kept.pop((number, microbatch))
        with self.pipeline.states.input_gradient(kept.passage):
            self._differentiate(number, microbatch, kept)
        self._halves[number, microbatch] = kept.passage

    def _weight_gradient(self, number: int, microbatch: int) -> None:
        self.pipeline.states.weight_gradient(self._halves.pop((number, microbatch)))

    def _differentiate(self, number: int, microbatch: int, kept: _Kept) -> None:
        stage = self.pipeline.stages[number]
        if stage.is_last:
            gradient = torch.ones((), dtype=self.scale.dtype, device=self.scale.device)
        else:
            gradient = _arrived(self._gradients.pop((number, microbatch)))
        torch.autograd.backward([kept.output], [gradient])
        if not stage.is_first:
            assert kept.input.grad is not None, "the stage's output does not depend on its input"
            self._gradients[number - 1, microbatch] = (kept.input.grad, None)
            kept.input.grad = None

    def _send_output(self, number: int, microbatch: int) -> None:
        tensor, _ = self._inputs.pop((number + 1, microbatch))
        self._send(tensor, number + 1, "pipeline/activation")

    def _send_gradient(self, number: int, microbatch: int) -> None:
        tensor, _ = self._gradients.pop((number - 1, microbatch))
        self._send(tensor, number - 1, "pipeline/gradient")

    def _send(self, tensor: Tensor, to: int, reason: str) -> None:
        position = self.pipeline.program.placement[to]
        under_way = self._sends.setdefault(position, deque())
        if len(under_way) >= _SENDS_UNDER_WAY:
            under_way.popleft().wait()
        under_way.append(send(tensor.contiguous(), self.pipeline.line, position, reason=reason))

    def _receive_input(self, number: int, microbatch: int) -> None:
        self._inputs[number, microbatch] = self._receive(microbatch, number - 1, "pipeline/activation")

    def _receive_gradient(self, number: int, microbatch: int) -> None:
        self._gradients[number, microbatch] = self._receive(microbatch, number + 1, "pipeline/gradient")

    def _receive(self, microbatch: int, source: int, reason: str) -> tuple[Tensor, Handle]:
        tensor = self.pipeline.boundary.empty(self.microbatches[microbatch][0])
        line = self.pipeline.line
        return tensor, receive(tensor, line, self.pipeline.program.placement[source], reason=reason)


def _arrived(item: tuple[Tensor, Handle | None]) -> Tensor:
    tensor, handle = item
    if handle is not None:
        handle.wait()
    return tensor
