"""Which part of a module a rank gets: a table from module paths to rules, one table per model.

A rule makes the rank's replacement of a module from the module itself, without memory: parameters are on the meta
device and say which boxes of which global tensors they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from shardwright.errors import LayoutError
from shardwright.layout.split import even_split, first_holder, kv_head_of_each, kv_heads_for
from shardwright.nn.parameters import Declaration, Local, Part
from shardwright.parallel.tensor.linear import ColwiseLinear, RowwiseLinear, SharedRows
from shardwright.parallel.tensor.region import Region
from shardwright.parallel.tensor.vocabulary import PositionsOfRank, VocabularyEmbedding, VocabularyOutput

Table = Mapping[str, "Rule"]
"""Patterns of module paths ("layers.*.mlp.down") to rules. Modules that no pattern names are replicated."""


class Rule(Protocol):
    """Makes a rank's replacement of a module."""

    def __call__(self, path: str, module: nn.Module, region: Region) -> nn.Module:
        """The replacement; may be the module itself with another declaration."""
        ...


def _declaration(module: nn.Module) -> Declaration:
    return getattr(module, "declaration", None) or Declaration()


def _meta(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, device="meta"))


def _whole(parameter: nn.Parameter, region: Region) -> tuple[Local, ...]:
    """All of a parameter that every rank has: the axis's first counts it."""
    shape = tuple(parameter.shape)
    return (Local("", shape, (0,) * len(shape), shape, counts=region.axis.index == 0),)


def _parts(module: nn.Module) -> tuple[Part, ...]:
    return _declaration(module).parts or (Part("", _weight(module).shape[0]),)


def _divide(length: int, path: str, what: str, region: Region) -> tuple[int, int]:
    """This rank's (begin, end). Raises LayoutError where a rank would get nothing."""
    if length < region.axis.degree:
        raise LayoutError(
            f"parallel.tp: {region.axis.degree} is more than the {length} {what} of {path}",
            f"nearest that works: tp = {length}",
        )
    return even_split(length, region.axis.degree, region.axis.index)


@dataclass(frozen=True)
class Replicated:
    """Every rank has all of it. `per_head`: it is applied to the heads that a rank has, so its gradient is a part.

    Otherwise its gradient is a part where positions are sharded, and the same on every rank where they are not.
    """

    per_head: bool = False

    def __call__(self, path: str, module: nn.Module, region: Region) -> nn.Module:
        """Change the declaration alone."""
        own = dict(module.named_parameters(recurse=False))
        if not own:
            return module
        partial = frozenset(own) if self.per_head or region.shards_positions else frozenset()
        locals_ = {name: _whole(parameter, region) for name, parameter in own.items()}
        module.declaration = replace(_declaration(module), locals=locals_, partial=partial)  # type: ignore[assignment]
        return module


@dataclass(frozen=True)
class Colwise:
    """Each part's outputs are divided evenly."""

    def __call__(self, path: str, module: nn.Module, region: Region) -> nn.Module:
        """A ColwiseLinear."""
        rows = [(part, [(*_divide(part.rows, path, "outputs", region), True)]) for part in _parts(module)]
        return _colwise(module, rows, region)


@dataclass(frozen=True)
class Heads:
    """A fused query, key and value product, divided by query heads; a rank has the key-value heads that those use.

    Heads that several ranks have are counted by the first of them, and their gradients are summed over all.
    """

    heads: int
    kv_heads: int
    head_dim: int

    def __call__(self, path: str, module: nn.Module, region: Region) -> nn.Module:
        """A ColwiseLinear."""
        axis, d = region.axis, self.head_dim
        query, *key_value = _parts(module)
        begin, end = _divide(self.heads, path, "query heads", region)
        rows = [(query, [(begin * d, end * d, True)])]
        first, last = kv_heads_for(self.heads, self.kv_heads, axis.degree, axis.index)
        for part in key_value:
            held = [(kv, first_holder(self.heads, self.kv_heads, axis.degree, kv)) for kv in range(first, last)]
            rows.append((part, [(kv * d, (kv + 1) * d, holder == axis.index) for kv, holder in held]))
        return _colwise(module, rows, region, self._shared((end - begin) * d, first, last, axis.degree))

    def _shared(self, local: int, first: int, last: int, degree: int) -> SharedRows | None:
        if self.kv_heads % degree == 0:
            return None
        d, total = self.head_dim, self.kv_heads * self.head_dim
        rows = (last - first) * d
        return SharedRows([(local, first * d, rows), (local + rows, total + first * d, rows)], 2 * total)


@dataclass(frozen=True)
class RepeatKV:
    """Where a rank's query heads do not divide evenly among its key-value heads, each gets a copy of its own."""

    heads: int
    kv_heads: int

    def __call__(self, path: str, module: nn.Module, region: Region) -> nn.Module:
        """The module itself, or one that repeats heads."""
        of_each = kv_head_of_each(self.heads, self.kv_heads, region.axis.degree, region.axis.index)
        counts = {of_each.count(head) for head in of_each}
        even = len(counts) == 1 and len(of_each) == counts.copy().pop() * (of_each[-1] + 1)
        return module if even else _Repeat(of_each)


class _Repeat(nn.Module):
    def __init__(self, heads: list[int]) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x_TBKD: torch.Tensor) -> torch.Tensor:
        return x_TBKD[:, :, self.heads]


@dataclass(frozen=True)
class Rowwise:
    """Inputs are divided evenly, in multiples of `unit` (a head's size)."""

    unit: int = 1

    def __call__(self, path: str, module: nn.Module, region: Region) -> nn.Module:
        """A RowwiseLinear."""
        weight, bias = _weight(module), _bias(module)
        outputs, inputs = weight.shape
        begin, end = _divide(inputs // self.unit, path, "inputs", region)
        begin, end = begin * self.unit, end * self.unit
        locals_: dict[str, tuple[Local, ...]] = {}
        locals_["weight"] = (Local("", (outputs, inputs), (0, begin), (outputs, end - begin)),)
        partial: frozenset[str] = frozenset()
        if bias is not None:
            locals_["bias"] = _whole(bias, region)
            partial = frozenset({"bias"}) if region.shards_positions else partial
        declaration = replace(_declaration(module), locals=locals_, partial=partial)
        own = None if bias is None else _meta(outputs)
        return RowwiseLinear(_meta(outputs, end - begin), own, declaration, region)


@dataclass(frozen=True)
class Vocabulary:
    """The words of a token embedding or of an output product are divided evenly."""

    output: bool = False

    def __call__(self, path: str, module: nn.Module, region: Region) -> nn.Module:
        """A VocabularyEmbedding or a VocabularyOutput."""
        weight = _weight(module)
        words, hidden = weight.shape
        begin, end = _divide(words, path, "words", region)
        locals_ = {"weight": (Local("", (words, hidden), (begin, 0), (end - begin, hidden)),)}
        declaration = replace(_declaration(module), locals=locals_)
        kind = VocabularyOutput if self.output else VocabularyEmbedding
        return kind(_meta(end - begin, hidden), begin, declaration, region)


@dataclass(frozen=True)
class Positions:
    """Learned positions: whole on every rank, added to the positions that it has."""

    def __call__(self, path: str, module: nn.Module, region: Region) -> nn.Module:
        """A PositionsOfRank, or the module itself where it has no parameters."""
        if not list(module.parameters()):
            return module
        declared = Replicated()(path, module, region)
        return PositionsOfRank(_meta(*_weight(module).shape), _declaration(declared), region)


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _bias(module: nn.Module) -> nn.Parameter | None:
    bias = getattr(module, "bias", None)
    assert bias is None or isinstance(bias, nn.Parameter)
    return bias


def _colwise(
    module: nn.Module,
    rows: list[tuple[Part, list[tuple[int, int, bool]]]],
    region: Region,
    shared: SharedRows | None = None,
) -> ColwiseLinear:
    """A ColwiseLinear of these rows, (begin, end, counts), of each part."""
    inputs = _weight(module).shape[1]
    ranges = [(part, begin, end, counts) for part, own in rows for begin, end, counts in own]
    weights = [Local(p.name, (p.rows, inputs), (b, 0), (e - b, inputs), counts) for p, b, e, counts in ranges]
    biases = [Local(p.name, (p.rows,), (b,), (e - b,), counts) for p, b, e, counts in ranges]
    total = sum(end - begin for _, begin, end, _ in ranges)
    parts = tuple(Part(part.name, sum(end - begin for begin, end, _ in own)) for part, own in rows)
    own = _declaration(module)
    declaration = replace(own, parts=parts, locals={"weight": tuple(weights), "bias": tuple(biases)})
    bias = None if _bias(module) is None else _meta(total)
    return ColwiseLinear(_meta(total, inputs), bias, declaration, region, shared)
