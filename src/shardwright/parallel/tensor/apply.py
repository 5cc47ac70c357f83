"""Tensor parallelism: the modules of a model replaced by a rank's part of them, as the model's table says."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from shardwright.errors import LayoutError
from shardwright.nn.decoder import Decoder
from shardwright.parallel.tensor.region import Region
from shardwright.parallel.tensor.rules import (
    Colwise,
    Heads,
    Positions,
    RepeatKV,
    Replicated,
    Rowwise,
    Rule,
    Table,
    Vocabulary,
)
from shardwright.spec.architecture import Architecture


def decoder_table(architecture: Architecture) -> Table:
    """The table of `nn.decoder.Decoder`."""
    a = architecture
    return {
        "embedding.tokens": Vocabulary(),
        "embedding.positions": Positions(),
        "layers.*.attention.qkv": Heads(a.heads, a.kv_heads, a.head_dim),
        "layers.*.attention.repeat_kv": RepeatKV(a.heads, a.kv_heads),
        "layers.*.attention.[qk]_norm": Replicated(per_head=True),
        "layers.*.attention.out": Rowwise(a.head_dim),
        "layers.*.mlp.gate_up": Colwise(),
        "layers.*.mlp.up": Colwise(),
        "layers.*.mlp.down": Rowwise(),
        "head.output": Vocabulary(output=True),
    }


def table_of(model: nn.Module, degree: int) -> Table:
    """A model's own `tensor_table()`, or the one that is known for it. Raises LayoutError where a degree needs one."""
    own = getattr(model, "tensor_table", None)
    if callable(own):
        return own()  # type: ignore[return-value]
    if isinstance(model, Decoder):
        return decoder_table(model.architecture)
    if degree > 1:
        raise LayoutError(
            f"parallel.tp: {degree}, but {type(model).__name__} has no tensor_table() that says what to divide",
            "give it one (docs/tensor-parallelism.md), or set tp = 1",
        )
    return {}


def divide(model: nn.Module, table: Table, region: Region) -> None:
    """Replace a model's modules in place. A parameter that modules share stays shared."""
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    # Modules are named before any is replaced, so that a rule sees the model as it was written.
    for path, module in list(model.named_modules()):
        own = dict(module.named_parameters(recurse=False))
        rule = _rule(path, table)
        if rule is None and not own:
            continue
        made = (rule or Replicated())(path, module, region)
        for name, parameter in list(made.named_parameters(recurse=False)):
            original = own.get(name)
            if original is None or original is parameter:
                continue
            setattr(made, name, replaced.setdefault(original, parameter))
        if made is not module:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made)


def _rule(path: str, table: Table) -> Rule | None:
    return next((rule for pattern, rule in table.items() if fnmatchcase(path, pattern)), None)
