"""The executor: it runs a step's microbatches, forward and backward, in order. One stage is simply a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardwright.parallel.zero.states import States


@dataclass
class Pipeline:
    """Runs microbatches through the stages of this rank.

    `between` is called after every microbatch but the last, when only what rests between them is in memory; the memory
    ledger reads there.
    """

    model: nn.Module
    states: States
    between: Callable[[], None] | None = None

    def run(self, microbatches: Sequence[tuple[Tensor, Tensor]], scale: Tensor) -> Tensor:
        """Forward and backward of each (tokens, targets); the sum of the losses times `scale`, a detached scalar."""
        total = torch.zeros((), dtype=torch.float64, device=scale.device)
        self.states.begin_step()
        for index, (tokens, targets) in enumerate(microbatches):
            self.states.begin_forward()
            loss = self.model(tokens, targets) * scale
            with self.states.backward(last=index == len(microbatches) - 1):
                loss.backward()
            total += loss.detach()
            if self.between is not None and index < len(microbatches) - 1:
                self.states.settle()
                self.between()
        return total

    def evaluate(self, microbatches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum of the losses of each (tokens, targets), fp64, without gradients."""
        total = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for tokens, targets in microbatches:
                total = total + self.model(tokens, targets).double().to(total.device)
        return total
