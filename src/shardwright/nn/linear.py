"""The linear layer as one device would write it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shardwright.nn.parameters import Declaration
from shardwright.nn.product import product


class Linear(nn.Module):
    """y = x W^T + b, with W [outputs, inputs]; may fuse several global tensors by rows (see `Declaration`)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, declaration: Declaration) -> None:
        super().__init__()
        self.declaration = declaration
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        return product(x, self.weight, self.bias)
