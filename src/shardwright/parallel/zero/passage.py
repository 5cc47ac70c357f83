"""What is known of a microbatch on its way through a stage.

Note: several microbatches under way. In a pipeline a stage runs the forward of one microbatch between the forward and
the backward of another. What is known of a microbatch's way through a stage is kept in a `Passage`, which the forward
makes and the backward is given. A unit's gradient is complete when every passage that uses it has been closed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from shardwright.parallel.sink import Write
from shardwright.parallel.zero.unit import Unit


@dataclass(eq=False)
class Passage:
    """One microbatch's way through one stage: which units it used, and what its backward has brought so far.

    `stays`: its backward follows its forward at once, so the last block's parameters need not be released between.
    """

    stage: int
    stays: bool
    num_uses: int = 0
    first_use: dict[Unit, int] = field(default_factory=dict)
    arrived: Counter[Unit] = field(default_factory=Counter)
    closed: set[Unit] = field(default_factory=set)
    to_close: list[Unit] = field(default_factory=list)
    last: set[Unit] = field(default_factory=set)  # the units that no later passage of this step uses
    deferred: dict[Unit, list[tuple[int, Write]]] = field(default_factory=dict)


def taken(parameter: nn.Parameter) -> Write:
    """What writes the gradient that a backward left on a parameter, taken from it."""
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None

    def write(view: Tensor, add: bool) -> None:
        (view.add_ if add else view.copy_)(gradient)

    return write


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors of what a block gives."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, tuple | list):
        return [tensor for item in output for tensor in tensors_in(item)]
    return []
