"""Which global tensors a parameter of a module holds, and how each starts.

A plain parameter is one global tensor under its dotted name. A module that fuses several (query, key and value in one
product) declares its parts; storage is fused, names are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from shardwright.layout.box import Box, Fill, GlobalTensor, Piece


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a fused parameter that are a global tensor of their own."""

    name: str
    rows: int


@dataclass(frozen=True)
class Local:
    """A box of a global tensor that a parameter holds, where a module has less than all of it.

    `part` names the global tensor as in `Part`, or is "" for the module's own. See `Piece` for `counts`.
    """

    part: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    counts: bool = True


@dataclass(frozen=True)
class Declaration:
    """What a module says of its own parameters; modules without one follow their type.

    `parts` splits every parameter of the module by rows into global tensors that are siblings of the module:
    module "attention.qkv" with part "q" holds "attention.q.weight". `std` is that of its matrices. `locals` says, by
    the parameter's name, which boxes it holds where it does not hold all; `partial` names the parameters whose
    gradient on one rank is one part of a sum.
    """

    parts: tuple[Part, ...] = ()
    std: float = 0.02
    locals: Mapping[str, tuple[Local, ...]] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Held:
    """The boxes that a parameter holds, in the order of its own elements, and whether its gradient is partial."""

    pieces: tuple[Piece, ...]
    partial: bool


def _fill(module: nn.Module, name: str, parameter: nn.Parameter) -> Fill:
    if name.endswith("bias"):
        return Fill.ZEROS
    is_norm = parameter.dim() == 1 and not isinstance(module, nn.Linear | nn.Embedding)
    return Fill.ONES if is_norm else Fill.NORMAL


def _whole_rows(declaration: Declaration, parameter: nn.Parameter) -> tuple[Local, ...]:
    """The parts, each whole; or the one tensor that the parameter is."""
    shape = tuple(parameter.shape)
    if not declaration.parts:
        return (Local("", shape, (0,) * len(shape), shape),)
    shapes = [(part.name, (part.rows, *shape[1:])) for part in declaration.parts]
    return tuple(Local(name, whole, (0,) * len(whole), whole) for name, whole in shapes)


def _held(module: nn.Module, path: str, name: str, parameter: nn.Parameter) -> Held:
    declaration = getattr(module, "declaration", None) or Declaration()
    fill = _fill(module, name, parameter)
    parent = path.rpartition(".")[0]
    pieces: list[Piece] = []
    start = 0
    for local in declaration.locals.get(name) or _whole_rows(declaration, parameter):
        owner = ".".join(filter(None, (parent, local.part))) if local.part else path
        tensor = GlobalTensor(f"{owner}.{name}" if owner else name, local.shape, fill, declaration.std)
        pieces.append(Piece(Box(tensor, local.offset, local.size), start, local.counts))
        start = pieces[-1].stop
    return Held(tuple(pieces), name in declaration.partial)


def held_by(model: nn.Module) -> dict[nn.Parameter, Held]:
    """For each parameter of a model, once, what it holds. A parameter shared by several modules is the first's."""
    found: dict[nn.Parameter, Held] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in found:
                found[parameter] = _held(module, path, name, parameter)
    return found


def pieces_of(model: nn.Module) -> dict[nn.Parameter, tuple[Piece, ...]]:
    """The pieces of `held_by` alone."""
    return {parameter: held.pieces for parameter, held in held_by(model).items()}
