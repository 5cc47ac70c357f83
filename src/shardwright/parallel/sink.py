"""Note: gradients written where they are summed.

The gradient of a matrix is a product of two matrices. Left to autograd it is computed into new memory and then copied
into the unit's flat buffer, or added to it. A module that computes its own backward can have the product written into
the buffer, or accumulated there, at once. That is right only while the parameter is used once in a microbatch: autograd
knows when the last of several uses is done, and a module does not. A parameter that is seen to be used again goes back
to autograd's way for good, before any backward of that microbatch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from shardwright.nn.product import matmul_into

Write = Callable[[Tensor, bool], None]
"""Writes a gradient into a view of the buffer, or adds it to what is there."""


class GradientSink:
    """Takes the gradient of one parameter from the module that computes it. `shared`: other modules have the parameter
    too, and autograd brings their part."""

    def __init__(self, deliver: Callable[[Write], None], shared: bool = False) -> None:
        self._deliver, self.shared = deliver, shared
        self._uses = 0
        self._counting = False
        self._reused = False

    def begin_forward(self) -> None:
        """A microbatch's forward begins."""
        self._uses, self._counting = 0, True

    def end_forward(self) -> None:
        """It has ended: a later use is the same use, computed again in the backward."""
        self._counting = False

    def use(self) -> None:
        """The parameter is used in a forward whose backward will deliver its gradient."""
        if self._counting:
            self._uses += 1
            self._reused = self._reused or self._uses > 1

    def product(self, a: Tensor, b: Tensor) -> bool:
        """Take a @ b as the gradient; False where autograd has to."""
        if self._reused:
            return False

        def write(view: Tensor, add: bool) -> None:
            matmul_into(view, a, b, add=add)

        self._deliver(write)
        return True

    def rows(self, indices: Tensor, gradients: Tensor) -> bool:
        """Take gradients [n, ...] of rows of the parameter, indices int64 [n], which may repeat; False where autograd
        has to. The gradient of the others is zero."""
        if self._reused:
            return False

        def write(view: Tensor, add: bool) -> None:
            if not add:
                view.zero_()
            wide = torch.promote_types(view.dtype, torch.float32)
            if wide == view.dtype:
                view.index_add_(0, indices, gradients.to(wide))
                return
            # A row that comes often would lose bits of every sum: each is added once.
            own, places = indices.unique(return_inverse=True)
            sums = gradients.new_zeros(len(own), *gradients.shape[1:], dtype=wide)
            view.index_add_(0, own, sums.index_add_(0, places, gradients.to(wide)).to(view.dtype))

        self._deliver(write)
        return True

    def scaled(self, gradient: Tensor, scale: Tensor) -> bool:
        """Take gradient * scale as the gradient; False where autograd has to."""
        if self._reused:
            return False
        factor = scale.to(gradient.dtype)

        def write(view: Tensor, add: bool) -> None:
            if view.dtype != gradient.dtype:
                (view.add_ if add else view.copy_)(gradient * factor)
            elif add:
                view.addcmul_(gradient, factor)
            else:
                torch.mul(gradient, factor, out=view)

        self._deliver(write)
        return True


def sink_of(parameter: Tensor) -> GradientSink | None:
    """The sink of a parameter that is in a unit and belongs to one module alone, where gradients are asked for.

    To be called outside the autograd function: inside it gradients are always switched off.
    """
    return getattr(parameter, "gradient_sink", None) if torch.is_grad_enabled() else None


def defers(module: nn.Module) -> bool:
    """Whether a module delivers its weight gradient as a product of two matrices, which can be made later."""
    return getattr(module, "delivers_product", False)


def fills_sinks(module: nn.Module, holders: int) -> bool:
    """Whether a module gives the gradient of its parameter, which so many modules have, to a sink."""
    return (
        defers(module)
        or getattr(module, "delivers_gradient", False)
        or (holders == 1 and getattr(module, "delivers_rows", False))
    )
