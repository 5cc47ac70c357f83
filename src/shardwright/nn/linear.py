"""The matrix product every layer is made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.nn.parameters import Declaration

_FEW_ROWS = 32
"""Up to so many the other product of `product` is faster: measured on AVX2 at 2 to 64 rows (docs/generate.md)."""


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, [..., inputs] to [..., outputs], contiguous.

    With few rows, as where each sequence has one new token, the time is that of reading the weights. CPU libraries cut
    a product by the rows of the left matrix, and read the right one again for each cut; so the weights stand on the
    left.
    """
    rows = x.numel() // max(1, x.shape[-1])
    decodes = torch.is_inference_mode_enabled() and 1 < rows <= _FEW_ROWS
    if not decodes or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight)
    return (weight @ x.reshape(rows, -1).T).T.contiguous().view(*x.shape[:-1], len(weight))


class Linear(nn.Module):
    """y = x W^T + b, with W [outputs, inputs]; may fuse several global tensors by rows (see `Declaration`)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, declaration: Declaration) -> None:
        super().__init__()
        self.declaration = declaration
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        return product(x, self.weight) if self.bias is None else F.linear(x, self.weight, self.bias)
