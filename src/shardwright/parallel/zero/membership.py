"""Which parameters make up which unit: a model's blocks, turned into units and the views that take their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from shardwright.errors import LayoutError
from shardwright.layout.flat import Member
from shardwright.nn.parameters import Held, held_by
from shardwright.parallel.data import DataParallel, Twin
from shardwright.parallel.offload.home import Home
from shardwright.parallel.zero.residency import ZeroStage
from shardwright.parallel.zero.unit import Unit


@dataclass(frozen=True)
class Storage:
    """How units are kept: the ZeRO stage, who communicates, the dtypes and device of their buffers, where what is owned
    lives, and whether there are gradients and masters at all."""

    stage: ZeroStage
    data: DataParallel
    dtype: torch.dtype
    grad_dtype: torch.dtype
    device: torch.device
    home: Home
    trains: bool = True


@dataclass(frozen=True)
class Shared:
    """A parameter that stages on two ranks use. `counts`: this rank is the one that counts it in norms."""

    twin: Twin
    counts: bool


def make_units(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    shared: Mapping[nn.Parameter, Shared],
    storage: Storage,
) -> tuple[list[Unit], list[list[Unit]]]:
    """The units of this rank's blocks, and for each block those that it uses.

    Views of the units' buffers take the place of the model's parameters. A parameter that a stage of another rank uses
    too is a unit by itself, so that its shares are the same on both.
    """
    held = held_by(model)
    units: list[Unit] = []
    unit_of: dict[nn.Parameter, Unit] = {}
    placed: dict[nn.Parameter, nn.Parameter] = {}
    for parameters in _groups(blocks, shared):
        _refuse_frozen(parameters, held)
        unit = _make_unit(parameters, held, shared.get(parameters[0]), storage)
        if any(unit.name == other.name for other in units):
            unit.name = f"{unit.name}#{len(units)}"
        units.append(unit)
        unit_of |= dict.fromkeys(parameters, unit)
        slots = zip(unit.layout.slots, unit.parameters, strict=True)
        placed |= {parameters[slot.index]: view for slot, view in slots}
    uses = [list(dict.fromkeys(unit_of[p] for p in block.parameters())) for block in blocks]
    _replace(model, placed)
    return units, uses


def refuse_outside(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Raises LayoutError for a parameter that belongs to no block."""
    inside = {parameter for block in blocks for parameter in block.parameters()}
    for name, parameter in model.named_parameters():
        if parameter not in inside:
            raise LayoutError(
                f"{name}: belongs to no block, so nobody would communicate it", "let blocks() cover every parameter"
            )


def _groups(blocks: Sequence[nn.Module], shared: Mapping[nn.Parameter, Shared]) -> list[list[nn.Parameter]]:
    """Each block's own parameters; one that several blocks share belongs to the first of them."""
    seen: set[nn.Parameter] = set()
    groups: list[list[nn.Parameter]] = []
    for block in blocks:
        new = [p for p in block.parameters() if p not in seen]
        seen.update(new)
        groups += [[p] for p in new if p in shared]
        groups.append([p for p in new if p not in shared])
    return [group for group in groups if group]


def _make_unit(
    parameters: list[nn.Parameter], held: Mapping[nn.Parameter, Held], shared: Shared | None, storage: Storage
) -> Unit:
    members = [Member(tuple(p.shape), held[p].pieces, held[p].partial) for p in parameters]
    if shared is not None and not shared.counts:
        members = [replace(m, pieces=tuple(replace(piece, counts=False) for piece in m.pieces)) for m in members]
    names = [held[p].pieces[0].box.name for p in parameters]
    return Unit(
        # Optimizer state is kept by this name: a parameter by itself is not called as the rest of its module is.
        names[0] if shared is not None else _common_name(names),
        members,
        storage.stage,
        storage.data,
        dtype=storage.dtype,
        grad_dtype=storage.grad_dtype,
        device=storage.device,
        home=storage.home,
        twin=None if shared is None else shared.twin,
        trains=storage.trains,
    )


def _common_name(names: list[str]) -> str:
    """The longest dotted path that all names begin with."""
    paths = [name.split(".")[:-1] for name in names]
    shortest = min(paths, key=len)
    depth = next((i for i, part in enumerate(shortest) if any(path[i] != part for path in paths)), len(shortest))
    return ".".join(shortest[:depth]) or names[0]


def _replace(model: nn.Module, placed: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Put the views of the flat buffers where the model's own parameters were, in every module that shares them."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter in placed:
                setattr(module, name, placed[parameter])


def _refuse_frozen(parameters: Sequence[nn.Parameter], held: Mapping[nn.Parameter, Held]) -> None:
    for parameter in parameters:
        if not parameter.requires_grad:
            name = held[parameter].pieces[0].box.name
            raise LayoutError(
                f"{name}: requires no gradient, and frozen parameters are not supported",
                "train it, or make it a buffer",
            )
