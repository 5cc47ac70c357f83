"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., size]."""
        return F.rms_norm(x, (self.size,), self.weight, self.eps)


class LayerNorm(nn.Module):
    """Layer normalisation with a bias over the last dimension (Ba et al. 2016)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., size]."""
        return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)


def make_norm(kind: str, size: int, eps: float) -> nn.Module:
    """The norm of a kind: rmsnorm or layernorm."""
    return {"rmsnorm": RMSNorm, "layernorm": LayerNorm}[kind](size, eps)
