"""Note: kernels. What an autograd function keeps from its forward for its backward is the function's own affair. What
it computes in between are functions of plain tensors, and a module holds those that it uses as its `kernels`. As
written they run operation by operation, and take care of memory: they work in place and drop what they no longer need.
Their `formulas` say the same values in the shortest form, with neither order nor memory, for a compiler to make one or
two passes over memory of. Whoever composes a model may replace a module's kernels (parallel/compiled.py); the model,
what it keeps and what it computes again stay the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Kernels(ABC):
    """Functions of tensors that no autograd watches, one a field. Those made without arguments are as written."""

    @abstractmethod
    def formulas(self) -> Self:
        """The same functions, to be compiled."""
        ...
