"""Which global tensors a parameter of a module holds, and how each starts.

A plain parameter is one global tensor under its dotted name. A module that fuses several (query, key and value in one
product) declares its parts; storage is fused, names are not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from shardwright.layout.box import Box, Fill, GlobalTensor, Piece


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a fused parameter that are a global tensor of their own."""

    name: str
    rows: int


@dataclass(frozen=True)
class Declaration:
    """What a module says of its own parameters; modules without one follow their type.

    `parts` splits every parameter of the module by rows into global tensors that are siblings of the module:
    module "attention.qkv" with part "q" holds "attention.q.weight". `std` is that of its matrices.
    """

    parts: tuple[Part, ...] = field(default=())
    std: float = 0.02


def _fill(module: nn.Module, name: str, parameter: nn.Parameter) -> Fill:
    if name.endswith("bias"):
        return Fill.ZEROS
    is_norm = parameter.dim() == 1 and not isinstance(module, nn.Linear | nn.Embedding)
    return Fill.ONES if is_norm else Fill.NORMAL


def _pieces(module: nn.Module, path: str, name: str, parameter: nn.Parameter) -> tuple[Piece, ...]:
    declaration = getattr(module, "declaration", Declaration())
    fill = _fill(module, name, parameter)
    inner = tuple(parameter.shape[1:])
    if not declaration.parts:
        full_name = f"{path}.{name}" if path else name
        return (Piece(Box.whole(GlobalTensor(full_name, tuple(parameter.shape), fill, declaration.std)), 0),)
    parent = path.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    pieces, start = [], 0
    for part in declaration.parts:
        tensor = GlobalTensor(f"{prefix}{part.name}.{name}", (part.rows, *inner), fill, declaration.std)
        pieces.append(Piece(Box.whole(tensor), start))
        start = pieces[-1].stop
    return tuple(pieces)


def pieces_of(model: nn.Module) -> dict[nn.Parameter, tuple[Piece, ...]]:
    """For each parameter of a model, once, the global tensors it holds, in the order of its own elements.

    A parameter shared by several modules is named by the first.
    """
    found: dict[nn.Parameter, tuple[Piece, ...]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in found:
                found[parameter] = _pieces(module, path, name, parameter)
    return found
