"""All units of a rank, driven by its stages' own forwards and backwards.

Note: when things happen. A block's parameters are needed from its forward's beginning to its end, and from the moment
the gradient of its output is known until the last gradient of its parameters has arrived. Hooks on the block and on
its output say so; the model is not changed. Reductions start in one fixed order on every rank, the reverse of the
blocks', and at fixed places among the gathers: where the backward of the next block begins, everything used after that
block alone is complete, parameters without a gradient in this microbatch included; the rest is closed at the backward's
end. So every rank that runs the same blocks issues the same collectives in the same order, whatever happened inside
them.

Note: several microbatches under way. In a pipeline a stage runs the forward of one microbatch between the forward and
the backward of another. What is known of a microbatch's way through a stage is kept in a `Passage`, which the forward
makes and the backward is given. A unit's gradient is complete when every passage that uses it has been closed.

Note: two halves of a backward. I computes the gradients of activations and leaves the products that make weight
gradients undone (their two factors are kept); W makes them. For the units that have such products everything that
reaches their buffers, and their reduction, belongs to W: no gradient buffer waits from I to W. W reads no parameters,
so under ZeRO-3 it gathers none. Units without such products, such as the embedding and the head, are done with in I.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.optim.owned import Optimizer, OwnedTensor
from shardwright.parallel.sink import GradientSink, Write, defers
from shardwright.parallel.zero.membership import Shared, Storage, make_units
from shardwright.parallel.zero.norm import squared_norm
from shardwright.parallel.zero.unit import Unit

_IN_FLIGHT = 2  # reductions under way at once: each holds a receive buffer of the other owners' shares


@dataclass(eq=False)
class Passage:
    """One microbatch's way through one stage: which units it used, and what its backward has brought so far.

    `stays`: its backward follows its forward at once, so the last block's parameters need not be released between.
    """

    stage: int
    stays: bool
    num_uses: int = 0
    first_use: dict[Unit, int] = field(default_factory=dict)
    arrived: Counter[Unit] = field(default_factory=Counter)
    closed: set[Unit] = field(default_factory=set)
    to_close: list[Unit] = field(default_factory=list)
    last: set[Unit] = field(default_factory=set)  # the units that no later passage of this step uses
    deferred: dict[Unit, list[tuple[int, Write]]] = field(default_factory=dict)


class States:
    """The units of a rank's stages: parameters, gradients and masters, as a ZeRO stage keeps them.

    `stages` are the blocks of each stage that the rank has, by the stage's number.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Mapping[int, Sequence[nn.Module]],
        storage: Storage,
        shared: Mapping[nn.Parameter, Shared] | None = None,
    ) -> None:
        self.stage, self._device = storage.stage, storage.device
        blocks = [block for own in stages.values() for block in own]
        self.units, uses = make_units(model, blocks, shared or {}, storage)
        remaining = iter(uses)
        self._uses = {stage: [next(remaining) for _ in own] for stage, own in stages.items()}
        """By stage and block, the units that the block uses."""
        self._of_stage = {stage: self._used_by(own) for stage, own in self._uses.items()}
        self._users = Counter(unit for used in self._of_stage.values() for unit in used)
        self._remaining: Counter[Unit] = Counter()
        self._in_flight: list[Unit] = []
        self._forward: Passage | None = None
        self._backward: Passage | None = None
        self._deferring: frozenset[Unit] = frozenset()
        self._active: Counter[Unit] = Counter()
        modules = list(dict.fromkeys(module for block in blocks for module in block.modules()))
        self._split = self._with_products(modules)
        self._sinks = self._make_sinks(modules)
        for stage, own in stages.items():
            self._watch(stage, own)
        for unit in self.units:
            for slot, parameter in enumerate(unit.parameters):
                parameter.register_post_accumulate_grad_hook(partial(self._arrive_by_autograd, unit, slot))

    def _used_by(self, uses: list[list[Unit]]) -> list[Unit]:
        """The units of a stage, in the order of the rank's units."""
        used = {unit for block in uses for unit in block}
        return [unit for unit in self.units if unit in used]

    def _with_products(self, modules: Sequence[nn.Module]) -> frozenset[Unit]:
        """The units whose weight gradients are products that can be made later."""
        deferrable = {p for module in modules if defers(module) for p in module.parameters(recurse=False)}
        return frozenset(unit for unit in self.units if any(p in deferrable for p in unit.parameters))

    # Hooks

    def _watch(self, stage: int, blocks: Sequence[nn.Module]) -> None:
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before_forward, stage, index))
            block.register_forward_hook(partial(self._after_forward, stage, index))

    def _make_sinks(self, modules: Sequence[nn.Module]) -> dict[int, list[GradientSink]]:
        """A sink for every parameter that one module of this rank alone has; by stage."""
        holders = Counter(p for m in modules for _, p in m.named_parameters(recurse=False))
        sinks: dict[Unit, list[GradientSink]] = {}
        for unit in self.units:
            for slot, parameter in enumerate(unit.parameters):
                if holders[parameter] == 1:
                    sink = GradientSink(partial(self._arrive, unit, slot))
                    sinks.setdefault(unit, []).append(sink)
                    parameter.gradient_sink = sink  # type: ignore[attr-defined]
        return {stage: [s for unit in used for s in sinks.get(unit, [])] for stage, used in self._of_stage.items()}

    def _is_elsewhere(self, stage: int) -> bool:
        """Whether the stage that runs is another: one block may be listed in several."""
        return self._forward is not None and self._forward.stage != stage

    def _before_forward(self, stage: int, index: int, *_: Any) -> None:
        if self._is_elsewhere(stage):
            return
        for unit in self._uses[stage][index]:
            unit.need()
            self._active[unit] += 1
        self._gather(stage, index + 1)

    def _after_forward(self, stage: int, index: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self._is_elsewhere(stage):
            return
        passage = self._forward
        tensors = [t for t in _tensors(output) if t.requires_grad]
        if tensors and passage is not None:
            for tensor in tensors:
                tensor.register_hook(partial(self._before_backward, passage, index, passage.num_uses))
            for unit in self._uses[stage][index]:
                passage.first_use.setdefault(unit, passage.num_uses)
            passage.num_uses += 1
        stays = bool(tensors) and passage is not None and passage.stays and index == len(self._uses[stage]) - 1
        for unit in self._uses[stage][index]:
            self._active[unit] -= 1
            if not stays and self._active[unit] == 0 and (self.stage.per_microbatch or not tensors):
                unit.release()

    def _before_backward(self, passage: Passage, index: int, use: int, _gradient: Tensor) -> None:
        self._close_after(passage, use)
        for unit in self._uses[passage.stage][index]:
            unit.need()
        self._gather(passage.stage, index - 1)

    def _gather(self, stage: int, index: int) -> None:
        """Begin to gather a block's units, if the stage has such a block."""
        if 0 <= index < len(self._uses[stage]):
            for unit in self._uses[stage][index]:
                unit.gather()

    def _arrive_by_autograd(self, unit: Unit, slot: int, parameter: Tensor) -> None:
        if parameter.grad is not None:  # else the module has delivered it
            self._arrive(unit, slot)

    def _arrive(self, unit: Unit, slot: int, write: Write | None = None) -> None:
        passage = self._backward
        if passage is None:
            raise RuntimeError("a backward outside States.backward(): its gradients would not reach their owners")
        if unit in passage.closed:
            raise RuntimeError(f"{unit.name}: a parameter is used outside its block's forward, before that")
        if unit in self._deferring:
            write = _taken(unit.parameters[slot]) if write is None else write
            passage.deferred.setdefault(unit, []).append((slot, write))
        else:
            unit.accumulate(slot, write)
        passage.arrived[unit] += 1
        if passage.arrived[unit] == len(unit.parameters):
            self._release(passage, unit)

    def _release(self, passage: Passage, unit: Unit) -> None:
        if self.stage.per_microbatch or unit in passage.last:
            unit.release()

    def _close_after(self, passage: Passage, use: int) -> None:
        """Close, in their order, the units whose uses in this passage all came after the given one: autograd runs
        backward through what was computed later before what was computed earlier."""
        while passage.to_close and self._is_complete(passage, passage.to_close[0], use):
            self._close(passage, passage.to_close.pop(0))

    def _is_complete(self, passage: Passage, unit: Unit, use: int) -> bool:
        return passage.first_use.get(unit, -1) > use or passage.arrived[unit] == len(unit.parameters)

    def _close(self, passage: Passage, unit: Unit) -> None:
        """A unit has all its gradients of this passage: begin to reduce them where the stage says so."""
        self._release(passage, unit)
        passage.closed.add(unit)
        self._remaining[unit] -= 1
        last = unit in passage.last
        if last or (self.stage.owns_gradients and self.stage.per_microbatch):
            if len(self._in_flight) >= _IN_FLIGHT:
                self._in_flight.pop(0).finish_scatter()
            unit.reduce(last)
            self._in_flight.append(unit)

    # The step

    def begin_step(self, num_microbatches: int) -> None:
        """Forget the last step's gradients; each stage will be passed by this many microbatches."""
        self._remaining = Counter({unit: users * num_microbatches for unit, users in self._users.items()})
        self._active.clear()
        for unit in self.units:
            unit.begin_step()

    @contextmanager
    def forward(self, stage: int, *, stays: bool = False) -> Iterator[Passage]:
        """Encloses a microbatch's forward through a stage; see `Passage` for `stays`."""
        for sink in self._sinks[stage]:
            sink.begin_forward()
        self._forward = Passage(stage, stays)
        try:
            yield self._forward
        finally:
            self._forward = None

    @contextmanager
    def backward(self, passage: Passage) -> Iterator[None]:
        """Encloses a microbatch's whole backward through a stage."""
        with self._running(passage, self._of_stage[passage.stage]):
            yield

    @contextmanager
    def input_gradient(self, passage: Passage) -> Iterator[None]:
        """Encloses the half of a backward that computes gradients of activations; the rest is kept for
        `weight_gradient`."""
        self._deferring = self._split
        try:
            with self._running(passage, [u for u in self._of_stage[passage.stage] if u not in self._split]):
                yield
                if self.stage.per_microbatch:
                    for unit in self._of_stage[passage.stage]:
                        unit.release()
        finally:
            self._deferring = frozenset()

    @torch.no_grad()  # the factors of the products belong to autograd's graph, and autograd is done with it
    def weight_gradient(self, passage: Passage) -> None:
        """Make the weight gradients that `input_gradient` left."""
        with self._running(passage, [u for u in self._of_stage[passage.stage] if u in self._split]):
            while passage.to_close:
                unit = passage.to_close.pop(0)
                for slot, write in passage.deferred.pop(unit, []):
                    unit.accumulate(slot, write)
                self._close(passage, unit)

    @contextmanager
    def _running(self, passage: Passage, units: Sequence[Unit]) -> Iterator[None]:
        """A backward of a passage that completes the gradients of these units."""
        passage.to_close = list(reversed(units))
        passage.last = {unit for unit in units if self._remaining[unit] == 1}
        self._backward = passage
        try:
            yield
            while passage.to_close:
                self._close(passage, passage.to_close.pop(0))
            for unit in units:
                self._release(passage, unit)
        finally:
            self._backward = None

    def prefetch(self, stage: int, *, backward: bool) -> None:
        """Begin to gather what a stage's next forward or backward needs first."""
        self._gather(stage, len(self._uses[stage]) - 1 if backward else 0)

    def settle(self) -> None:
        """Finish what is under way between microbatches, so that only what rests there is left."""
        for unit in self.units:
            unit.finish_scatter()
        self._in_flight = []

    def collect_gradients(self) -> list[OwnedTensor]:
        """Wait until every gradient is complete with its owner; the owned tensors, in the order of the blocks."""
        for unit in reversed(self.units):
            unit.finish_scatter()
        for unit in reversed(self.units):
            unit.finish_reduction()
        # All under way before any is waited for, and in one order: pairs of ranks may form chains and rings.
        twins = sorted((u.twin.order, u) for u in self.units if u.twin is not None)
        for handle in [unit.exchange() for _, unit in twins]:
            handle.wait()
        self._in_flight = []
        return self.owned_tensors()

    def owned_tensors(self) -> list[OwnedTensor]:
        """What this rank updates, in the order of the blocks."""
        return [unit.owned_tensor() for unit in self.units]

    def initialise(self, seed: int) -> None:
        """Give every owned element its initial value."""
        for unit in self.units:
            unit.initialise(seed)

    def update(self, optimizer: Optimizer, lr: float, gradient_scale: float) -> None:
        """Update what this rank owns. Each unit is published at once, so that the transfer of one runs under the
        update of the next and, for the last ones, under the next forward."""
        for unit in self.units:
            optimizer.update(unit.owned_tensor(), lr, gradient_scale)
            unit.publish()

    def squared_norm(self) -> Tensor:
        """This rank's part of the squared norm of all gradients, fp64; every element counts on one rank."""
        parts = [squared_norm(part) for unit in self.units for part in unit.counted_gradient()]
        return torch.stack([*parts, torch.zeros((), dtype=torch.float64, device=self._device)]).sum()


def _taken(parameter: nn.Parameter) -> Write:
    """What writes the gradient that a backward left on a parameter, taken from it."""
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None

    def write(view: Tensor, add: bool) -> None:
        (view.add_ if add else view.copy_)(gradient)

    return write


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, tuple | list):
        return [tensor for item in output for tensor in _tensors(item)]
    return []
