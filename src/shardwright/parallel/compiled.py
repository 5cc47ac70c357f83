"""Note: compiled between products. What lies between matrix products (norms, rotations, activations, the loss of a
chunk of logits) moves memory and computes little. Compiled, each becomes one or two kernels that hold bf16 in
registers. What is compiled are the modules' kernels (nn/kernels.py), functions of tensors alone: autograd functions,
sinks, hooks, collectives and recomputation stay outside, and memory is kept and freed as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.nn.kernels import Kernels


def compile_kernels(model: nn.Module) -> None:
    """Let a model's modules compute with compiled kernels, one set for each kind. The first use compiles."""
    sets: dict[type[Kernels], Kernels] = {}
    for module in model.modules():
        kernels = getattr(module, "kernels", None)
        if isinstance(kernels, Kernels):
            if type(kernels) not in sets:
                sets[type(kernels)] = _compiled_set(kernels.formulas())
            module.kernels = sets[type(kernels)]  # type: ignore[assignment]


def _compiled_set(formulas: Kernels) -> Kernels:
    return replace(formulas, **{field.name: _compiled(getattr(formulas, field.name)) for field in fields(formulas)})


def _compiled(formula: Callable[..., Any]) -> Callable[..., Any]:
    # For each shape its own kernel: those for any shape take three to ten times as long. torch counts what it has
    # compiled by the code, so a set has a copy of its own, or a process with many models would reach the limit.
    own = FunctionType(
        formula.__code__.replace(), formula.__globals__, formula.__name__, formula.__defaults__, formula.__closure__
    )
    compiled = torch.compile(own, dynamic=False)  # what meets more shapes than torch's limit runs as it is written

    def run(*arguments: Any) -> Any:
        # Whether autograd watches a tensor is no affair of a kernel, but would be a reason to compile it again.
        return compiled(*(x.detach() if isinstance(x, Tensor) else x for x in arguments))

    return run
