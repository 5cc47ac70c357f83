"""What an optimizer updates: flat owned tensors, whoever owns them and wherever they live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from shardwright.layout.chunk import Window, windows


class Place(Protocol):
    """Where the state of owned tensors lives."""

    def zeros(self, like: Tensor) -> Tensor:
        """Flat state of a tensor's length and dtype."""
        ...

    def settle(self) -> None:
        """Return when no update is under way that could still change what lives here."""
        ...


class Beside:
    """State lives beside the values, and an update is complete, in the order of the device, when it returns."""

    def zeros(self, like: Tensor) -> Tensor:
        """See `Place`."""
        return torch.zeros_like(like)

    def settle(self) -> None:
        """See `Place`."""


@dataclass
class OwnedTensor:
    """A flat range of values that this rank updates, with its gradient of the same length.

    `values` are the masters: fp32, or fp64 in fp64 runs. `gradient` may be of another dtype. The first `decayed`
    elements take weight decay. `name` is the same in every run of one layout.
    """

    name: str
    values: Tensor
    gradient: Tensor
    decayed: int
    place: Place = field(default_factory=Beside)

    def parts(self) -> list[tuple[slice, bool]]:
        """Up to two ranges and whether each takes weight decay."""
        stop = self.values.numel()
        ranges = [(slice(0, self.decayed), True), (slice(self.decayed, stop), False)]
        return [(part, decays) for part, decays in ranges if part.stop > part.start]

    def windows(self, most: int) -> list[Window]:
        """The range in pieces of at most so many elements; see layout/chunk.py for where it is cut."""
        return windows(self.values.numel(), self.decayed, most)


@dataclass(frozen=True)
class Rule:
    """What one update does with every element of an owned tensor. `count`: updates so far, this one included."""

    count: int
    lr: float
    gradient_scale: float

    def ready(self, gradient: Tensor, out: Tensor) -> Tensor:
        """The scaled gradient in the dtype of `out`: written there, or in place where it has that dtype already."""
        if gradient.dtype == out.dtype:
            return gradient if self.gradient_scale == 1.0 else gradient.mul_(self.gradient_scale)
        if out.device.type == "cpu":  # there one pass over two dtypes is slower than two over one
            return out.copy_(gradient).mul_(self.gradient_scale)
        # By a tensor that is no scalar: the product is then one pass, made in the wider dtype.
        scale = torch.full((1,), self.gradient_scale, dtype=out.dtype, device=out.device)
        return torch.mul(gradient, scale, out=out)


class Optimizer(Protocol):
    """Updates owned tensors in place and keeps state for each, by name."""

    def state(self, name: str) -> dict[str, Tensor]:
        """Named state of one owned tensor, wherever it lives: flat tensors of its length, and scalars on the host.

        Returns when no update is under way that could still change it.
        """
        ...

    def moments(self, name: str) -> list[Tensor]:
        """The flat tensors of one owned tensor's state, in the order in which `apply` takes them; waits for nothing."""
        ...

    def begin(self, name: str, lr: float, gradient_scale: float) -> Rule:
        """Count one update of an owned tensor. Every element is then to be given to `apply` once, with this rule."""
        ...

    def apply(self, values: Tensor, gradient: Tensor, moments: Sequence[Tensor], rule: Rule, *, decays: bool) -> None:
        """Update some values and their moments in place. A function of what it is given alone; `gradient` is scaled and
        of the values' dtype."""
        ...

    def update(self, owned: OwnedTensor, lr: float, gradient_scale: float, narrow_values: Tensor | None = None) -> None:
        """One step for one owned tensor where it lies, its gradient multiplied by `gradient_scale` first (and used
        up). `narrow_values`, of any dtype, get what the values are then."""
        ...
