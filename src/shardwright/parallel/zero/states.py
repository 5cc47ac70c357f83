"""All units of a rank, driven by its stages' own forwards and backwards.

Note: when things happen. A block's parameters are needed from its forward's beginning to its end, and from the moment
the gradient of its output is known until the last gradient of its parameters has arrived. Hooks on the block and on
its output say so; the model is not changed. Reductions start in one fixed order on every rank, the reverse of the
blocks', and at fixed places among the gathers: where the backward of the next block begins, everything used after that
block alone is complete, parameters without a gradient in this microbatch included; the rest is closed at the backward's
end. So every rank that runs the same blocks issues the same collectives in the same order, whatever happened inside
them.

Note: two halves of a backward. I computes the gradients of activations and leaves the products that make weight
gradients undone (their two factors are kept); W makes them. For the units that have such products everything that
reaches their buffers, and their reduction, belongs to W: no gradient buffer waits from I to W. W reads no parameters,
so under ZeRO-3 it gathers none. Units without such products, such as the embedding and the head, are done with in I.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.nn.initial import Values
from shardwright.optim.owned import Optimizer, OwnedTensor
from shardwright.parallel.sink import GradientSink, Write, defers, fills_sinks
from shardwright.parallel.zero.membership import Shared, Storage, make_units
from shardwright.parallel.zero.norm import squared_norm
from shardwright.parallel.zero.passage import Passage, taken, tensors_in
from shardwright.parallel.zero.unit import CATEGORIES, Unit

_IN_FLIGHT = 2  # reductions under way at once: each holds a receive buffer of the other owners' shares


class _Arrival:
    """A hook on a parameter, for gradients that autograd brings.

    torch keeps it where Python's collector does not look: were its references strong, no states would ever be freed.
    """

    def __init__(self, states: States, unit: Unit, slot: int) -> None:
        self._states, self._unit, self._slot = weakref.ref(states), weakref.ref(unit), slot

    def __call__(self, parameter: Tensor) -> None:
        states, unit = self._states(), self._unit()
        assert states is not None and unit is not None, "a backward through the parameters of a runtime that is gone"
        if parameter.grad is not None:  # else the module has delivered it
            states.arrive(unit, self._slot)


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
        self.stage, self.home, self._device = storage.stage, storage.home, storage.device
        blocks = [block for own in stages.values() for block in own]
        self.units, uses = make_units(model, blocks, shared or {}, storage)
        if storage.trains:
            self.home.prepare(self.units)
        remaining = iter(uses)
        self._uses = {stage: [next(remaining) for _ in own] for stage, own in stages.items()}
        """By stage and block, the units that the block uses."""
        self._of_stage = {stage: self._used_by(own) for stage, own in self._uses.items()}
        self._users = Counter(unit for used in self._of_stage.values() for unit in used)
        self._remaining: Counter[Unit] = Counter()
        self._in_flight: list[Unit] = []
        self._leaving: list[Unit] = []
        self._unpublished: list[Unit] = []
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
                parameter.register_post_accumulate_grad_hook(_Arrival(self, unit, slot))

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
        """A sink for every parameter that one module of this rank alone fills; by stage. Where others have the
        parameter too, as a tied embedding, autograd brings their part, and says when all has arrived."""
        holding = [(m, p) for m in modules for _, p in m.named_parameters(recurse=False)]
        holders = Counter(p for _, p in holding)
        filling = Counter(p for m, p in holding if fills_sinks(m, holders[p]))
        sinks: dict[Unit, list[GradientSink]] = {}
        for unit in self.units:
            for slot, parameter in enumerate(unit.parameters):
                if filling[parameter] == 1:
                    shared = holders[parameter] > 1
                    sink = GradientSink(partial(self._arrive_in_part if shared else self.arrive, unit, slot), shared)
                    sinks.setdefault(unit, []).append(sink)
                    parameter.gradient_sink = sink  # type: ignore[attr-defined]
        return {stage: [s for unit in used for s in sinks.get(unit, [])] for stage, used in self._of_stage.items()}

    def _is_elsewhere(self, stage: int) -> bool:
        """Whether the stage that runs is another: one block may be listed in several."""
        return self._forward is not None and self._forward.stage != stage

    def _before_forward(self, stage: int, index: int, *_: Any) -> None:
        if self._is_elsewhere(stage):
            return
        self._publish(self._uses[stage][index])
        for unit in self._uses[stage][index]:
            unit.need()
            self._active[unit] += 1
        self._gather(stage, index + 1)

    def _after_forward(self, stage: int, index: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self._is_elsewhere(stage):
            return
        passage = self._forward
        tensors = [t for t in tensors_in(output) if t.requires_grad]
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
            self._publish(self._uses[stage][index])
            for unit in self._uses[stage][index]:
                unit.gather()

    def _publish(self, units: Sequence[Unit]) -> None:
        """Publish what the last update left unpublished, up to these units: in the order of all units, which every rank
        has alike, whichever blocks it runs."""
        while any(unit in self._unpublished for unit in units):
            self._unpublished.pop(0).publish()

    def arrive(self, unit: Unit, slot: int, write: Write | None = None) -> None:
        """The whole gradient of a parameter in this passage, or what was left of it."""
        passage = self._take(unit, slot, write)
        passage.arrived[unit] += 1
        if passage.arrived[unit] == len(unit.parameters):
            self._release(passage, unit)

    def _arrive_in_part(self, unit: Unit, slot: int, write: Write) -> None:
        self._take(unit, slot, write)

    def _take(self, unit: Unit, slot: int, write: Write | None) -> Passage:
        """A gradient, or a part of one."""
        passage = self._backward
        if passage is None:
            raise RuntimeError("a backward outside States.backward(): its gradients would not reach their owners")
        if unit in passage.closed:
            raise RuntimeError(f"{unit.name}: a parameter is used outside its block's forward, before that")
        if unit in self._deferring:
            write = taken(unit.parameters[slot]) if write is None else write
            passage.deferred.setdefault(unit, []).append((slot, write))
        else:
            unit.accumulate(slot, write)
        return passage

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
                self._finish(self._in_flight.pop(0))
            unit.reduce(last)
            self._in_flight.append(unit)

    def _finish(self, unit: Unit) -> None:
        """End the oldest reduction under way. What it begins, the sum over the copies, goes on until the next ends."""
        unit.finish_scatter()
        for earlier in self._leaving:
            earlier.bound_memory()
            if earlier.twin is None:
                self.home.take(earlier)
        self._leaving = [unit] if unit.is_reduced else []

    # The step

    def begin_step(self, num_microbatches: int) -> None:
        """Forget the last step's gradients; each stage will be passed by this many microbatches."""
        self._remaining = Counter({unit: users * num_microbatches for unit, users in self._users.items()})
        self._active.clear()
        self._in_flight, self._leaving = [], []  # a step that failed may have left some
        self.home.begin_step()
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
            for sink in self._sinks[stage]:
                sink.end_forward()

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
        self._publish(self.units)  # before the first reduction, also what no forward has asked for
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

    def collect_gradients(self) -> None:
        """Wait until every gradient is complete with its owner, and on its way to where it is used."""
        for unit in reversed(self.units):
            unit.finish_scatter()
        for unit in reversed(self.units):
            unit.finish_reduction()
            if unit.twin is None:
                self.home.take(unit)
        # All under way before any is waited for, and in one order: pairs of ranks may form chains and rings.
        twins = sorted((u.twin.order, u) for u in self.units if u.twin is not None)
        for (_, unit), handle in [(twin, twin[1].exchange()) for twin in twins]:
            handle.wait()
            self.home.take(unit)
        self._in_flight, self._leaving = [], []

    def finish(self) -> None:
        """Wait for what is still under way, as before a runtime is dropped. To be called on every rank."""
        self._publish(self.units)
        for unit in self.units:
            unit.finish_reduction()
        self.home.settle()

    def owned_tensors(self) -> list[OwnedTensor]:
        """What this rank updates, in the order of the blocks, once no update is under way."""
        return [unit.owned_tensor() for unit in self.units]

    def initialise(self, source: Values) -> None:
        """Give every owned element its first value."""
        for unit in self.units:
            unit.initialise(source)

    def update(self, optimizer: Optimizer, lr: float, gradient_scale: float) -> None:
        """Update what this rank owns, where it lives. What lies on the way from there to whole parameters may be still
        under way afterwards: a unit is waited for when it is needed."""
        self.home.update(self.units, optimizer, lr, gradient_scale)
        self._unpublished = list(self.units)

    def squared_norm(self) -> Tensor:
        """This rank's part of the squared norm of all gradients, fp64; every element counts on one rank."""
        parts = [squared_norm(part) for unit in self.units for part in unit.counted_gradient()]
        return torch.stack([*parts, torch.zeros((), dtype=torch.float64, device=self._device)]).sum()

    # Ledger

    def resident_by_unit(self, optimizer: Optimizer) -> list[tuple[Unit, dict[str, list[Tensor]]]]:
        """Each unit's live tensors by the ledger's categories, moments included."""
        found = []
        for unit in self.units:
            resident = unit.resident()
            resident[self.home.category] += optimizer.moments(unit.name)
            found.append((unit, resident))
        return found

    def resident(self, optimizer: Optimizer) -> dict[str, list[Tensor]]:
        """All live tensors of state by the ledger's categories, each memory once; `offload` is the home's buffers."""
        found: dict[str, list[Tensor]] = {category: [] for category in CATEGORIES}
        for _, resident in self.resident_by_unit(optimizer):
            for category, tensors in resident.items():
                found[category] += tensors
        found["offload"] += self.home.buffers()
        return found
