"""All units of a rank, driven by the model's own forward and backward.

Note: when things happen. A block's parameters are needed from its forward's beginning to its end, and from the moment
the gradient of its output is known until the last gradient of its parameters has arrived. Hooks on the block and on
its output say so; the model is not changed. Reductions start in one fixed order on every rank, the reverse of the
blocks', and at fixed places among the gathers: where the backward of the next block begins, everything used after that
block alone is complete, parameters without a gradient in this microbatch included; the rest is closed by the executor
at the backward's end. So every rank that runs the same blocks issues the same collectives in the same order, whatever
happened inside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.errors import LayoutError
from shardwright.layout.flat import Member
from shardwright.nn.parameters import Held, held_by
from shardwright.optim.owned import Optimizer, OwnedTensor
from shardwright.parallel.data import DataParallel
from shardwright.parallel.sink import GradientSink, Write
from shardwright.parallel.zero.residency import Stage
from shardwright.parallel.zero.unit import Unit

_IN_FLIGHT = 2  # reductions under way at once: each holds a receive buffer of the other owners' shares


def _block_units(blocks: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """Each block's own parameters; one that several blocks share belongs to the first of them."""
    seen: set[nn.Parameter] = set()
    units = []
    for block in blocks:
        own = [p for p in block.parameters() if p not in seen]
        seen.update(own)
        units.append(own)
    return units


class States:
    """The units of a model's blocks: parameters, gradients and masters, as a ZeRO stage keeps them."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        stage: Stage,
        data: DataParallel,
        *,
        dtype: torch.dtype,
        grad_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.stage = stage
        self.units: list[Unit] = []
        held = held_by(model)
        _refuse_frozen(model, held)
        unit_of: dict[nn.Parameter, Unit] = {}
        placed: dict[nn.Parameter, nn.Parameter] = {}
        for parameters in _block_units(blocks):
            if not parameters:
                continue
            name = _common_name([held[p].pieces[0].box.name for p in parameters])
            members = [Member(tuple(p.shape), held[p].pieces, held[p].partial) for p in parameters]
            unit = Unit(name, members, stage, data, dtype=dtype, grad_dtype=grad_dtype, device=device)
            self.units.append(unit)
            unit_of |= dict.fromkeys(parameters, unit)
            slots = zip(unit.layout.slots, unit.parameters, strict=True)
            placed |= {parameters[slot.index]: view for slot, view in slots}
        _refuse_outside(model, unit_of)
        self._uses = [list(dict.fromkeys(unit_of[p] for p in block.parameters())) for block in blocks]
        _replace(model, placed)
        self._arrived: dict[Unit, int] = {}
        self._num_uses = 0
        self._first_use: dict[Unit, int] = {}
        self._to_reduce: list[Unit] = []
        self._closed: set[Unit] = set()
        self._in_flight: list[Unit] = []
        self._last = False
        self._in_backward = False
        self._active: dict[Unit, int] = dict.fromkeys(self.units, 0)
        self._sinks = self._make_sinks(model)
        self._watch(blocks)

    # Hooks

    def _watch(self, blocks: Sequence[nn.Module]) -> None:
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before_forward, index))
            block.register_forward_hook(partial(self._after_forward, index))
        for unit in self.units:
            for slot, parameter in enumerate(unit.parameters):
                parameter.register_post_accumulate_grad_hook(partial(self._arrive_by_autograd, unit, slot))

    def _make_sinks(self, model: nn.Module) -> list[GradientSink]:
        """A sink for every parameter that one module alone has."""
        holders = Counter(p for m in model.modules() for _, p in m.named_parameters(recurse=False))
        sinks: list[GradientSink] = []
        for unit in self.units:
            for slot, parameter in enumerate(unit.parameters):
                if holders[parameter] == 1:
                    sinks.append(GradientSink(partial(self._arrive, unit, slot)))
                    parameter.gradient_sink = sinks[-1]  # type: ignore[attr-defined]
        return sinks

    def _before_forward(self, index: int, *_: Any) -> None:
        for unit in self._uses[index]:
            unit.need()
            self._active[unit] += 1
        self._prefetch(index + 1)

    def _after_forward(self, index: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        tensors = [t for t in _tensors(output) if t.requires_grad]
        for tensor in tensors:
            tensor.register_hook(partial(self._before_backward, index, self._num_uses))
        if tensors:
            for unit in self._uses[index]:
                self._first_use.setdefault(unit, self._num_uses)
            self._num_uses += 1
        # The last block's backward follows its forward at once, so its parameters stay.
        stays = bool(tensors) and index == len(self._uses) - 1
        for unit in self._uses[index]:
            self._active[unit] -= 1
            if not stays and self._active[unit] == 0 and (self.stage.per_microbatch or not tensors):
                unit.release()

    def _before_backward(self, index: int, use: int, _gradient: Tensor) -> None:
        self._close(use)
        for unit in self._uses[index]:
            unit.need()
        self._prefetch(index - 1)

    def _prefetch(self, index: int) -> None:
        if 0 <= index < len(self._uses):
            for unit in self._uses[index]:
                unit.gather()

    def _arrive_by_autograd(self, unit: Unit, slot: int, parameter: Tensor) -> None:
        if parameter.grad is not None:  # else the module has delivered it
            self._arrive(unit, slot)

    def _arrive(self, unit: Unit, slot: int, write: Write | None = None) -> None:
        if not self._in_backward:
            raise RuntimeError("a backward outside States.backward(): its gradients would not reach their owners")
        if unit in self._closed:
            raise RuntimeError(f"{unit.name}: a parameter is used outside its block's forward, before that")
        unit.accumulate(slot, write)
        self._arrived[unit] = self._arrived.get(unit, 0) + 1
        if self._arrived[unit] == len(unit.parameters) and (self.stage.per_microbatch or self._last):
            unit.release()

    def _close(self, use: int) -> None:
        """Begin to reduce, in their order, the units whose uses in this microbatch all came after the given one:
        autograd runs backward through what was computed later before what was computed earlier."""
        while self._to_reduce and self._is_complete(self._to_reduce[0], use):
            unit = self._to_reduce.pop(0)
            if self.stage.per_microbatch or self._last:
                unit.release()
            self._reduce(unit)

    def _is_complete(self, unit: Unit, use: int) -> bool:
        return self._first_use.get(unit, -1) > use or self._arrived.get(unit) == len(unit.parameters)

    def _reduce(self, unit: Unit) -> None:
        if len(self._in_flight) >= _IN_FLIGHT:
            self._in_flight.pop(0).finish_scatter()
        unit.reduce(self._last)
        self._closed.add(unit)
        self._in_flight.append(unit)

    # The step

    def begin_step(self) -> None:
        """Forget the last step's gradients."""
        for unit in self.units:
            unit.begin_step()

    def begin_forward(self) -> None:
        """A microbatch's forward begins."""
        for sink in self._sinks:
            sink.begin_forward()

    @contextmanager
    def backward(self, last: bool) -> Iterator[None]:
        """Encloses the backward of one microbatch; `last` is the step's last, after which gradients are complete."""
        self._last, self._in_backward = last, True
        self._arrived, self._closed = {}, set()
        reduces = last or (self.stage.owns_gradients and self.stage.per_microbatch)
        self._to_reduce = list(reversed(self.units)) if reduces else []
        try:
            yield
            while self._to_reduce:
                self._reduce(self._to_reduce.pop(0))
            for unit in self.units:
                if self.stage.per_microbatch or last:
                    unit.release()
        finally:
            self._in_backward, self._num_uses, self._first_use = False, 0, {}

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
        parts = [_squared_norm(part) for unit in self.units for part in unit.counted_gradient()]
        return torch.stack([*parts, torch.zeros((), dtype=torch.float64, device=self.units[0].whole.device)]).sum()


def _squared_norm(flat: Tensor) -> Tensor:
    """Sum of squares, fp64. Rows first: one running fp32 sum over millions would lose what the proof checks."""
    if flat.dtype == torch.float64:
        return flat.dot(flat)
    if flat.dtype != torch.float32:
        flat = flat.float()
    rows = flat.numel() // 1024 * 1024
    norms = torch.linalg.vector_norm(flat[:rows].view(-1, 1024), dim=1).double()
    return norms.dot(norms) + flat[rows:].double().square().sum()


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, tuple | list):
        return [tensor for item in output for tensor in _tensors(item)]
    return []


def _common_name(names: list[str]) -> str:
    """The longest dotted path that all names begin with."""
    paths = [name.split(".")[:-1] for name in names]
    shortest = min(paths, key=len)
    depth = next((i for i, part in enumerate(shortest) if any(path[i] != part for path in paths)), len(shortest))
    return ".".join(shortest[:depth]) or names[0]


def _replace(model: nn.Module, placed: dict[nn.Parameter, nn.Parameter]) -> None:
    """Put the views of the flat buffers where the model's own parameters were, in every module that shares them."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, placed[parameter])


def _refuse_frozen(model: nn.Module, held: dict[nn.Parameter, Held]) -> None:
    for parameter in model.parameters():
        if not parameter.requires_grad:
            name = held[parameter].pieces[0].box.name
            raise LayoutError(
                f"{name}: requires no gradient, and frozen parameters are not supported",
                "train it, or make it a buffer",
            )


def _refuse_outside(model: nn.Module, unit_of: dict[nn.Parameter, Unit]) -> None:
    for name, parameter in model.named_parameters():
        if parameter not in unit_of:
            raise LayoutError(
                f"{name}: belongs to no block, so nobody would communicate it", "let blocks() cover every parameter"
            )
