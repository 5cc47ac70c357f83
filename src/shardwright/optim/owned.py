"""What an optimizer updates: flat owned tensors, whoever owns them and wherever they live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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

    def parts(self) -> list[tuple[slice, bool]]:
        """Up to two ranges and whether each takes weight decay."""
        stop = self.values.numel()
        ranges = [(slice(0, self.decayed), True), (slice(self.decayed, stop), False)]
        return [(part, decays) for part, decays in ranges if part.stop > part.start]


class Optimizer(Protocol):
    """Updates owned tensors in place and keeps state for each, by name."""

    def update(self, owned: OwnedTensor, lr: float, gradient_scale: float) -> None:
        """One step for one owned tensor, its gradient multiplied by `gradient_scale` first (and used up)."""
        ...

    def state(self, name: str) -> dict[str, Tensor]:
        """Named state of one owned tensor: flat tensors of its length, and scalars."""
        ...
