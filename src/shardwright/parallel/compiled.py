"""Note: compiled between products. What a layer does between its matrix products (norms, rotations, activations,
residual sums) moves memory and computes little; compiled, neighbouring operations become one kernel. The products
themselves stay outside: they communicate, and deliver weight gradients into flat buffers, which a compiler may not
reorder. So a layer is compiled with a break at every module that delivers a product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shardwright.parallel.sink import defers


class CompiledLayers:
    """The layers of a composed model (`model.layers`), whose forwards can be switched between compiled and eager.

    Hooks on the layers run outside what is compiled, so units are gathered and reduced as ever.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[nn.Module] = list(getattr(model, "layers", []))
        self._eager: list[Callable[..., Any]] = [layer.forward for layer in self._layers]
        self._compiled: list[Callable[..., Any]] = []

    def switch(self, compiled: bool) -> None:
        """Let the layers run compiled, or as they are written."""
        if compiled and not self._compiled:
            self._compile()
        for layer, forward in zip(self._layers, self._compiled if compiled else self._eager, strict=True):
            layer.forward = forward

    def _compile(self) -> None:
        for layer in self._layers:
            for module in layer.modules():
                if defers(module):
                    module.forward = torch.compiler.disable(module.forward)
        self._compiled = [torch.compile(forward, dynamic=False) for forward in self._eager]
