"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _RMSNorm(torch.autograd.Function):
    """torch has one kernel for it on CUDA, and on CPUs a chain of ten that keeps two copies of its input."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        normalised = x * scale
        product = grad * normalised
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        # The part of the gradient along x changes its length alone, which the normalisation takes away again.
        along = product @ weight.to(product.dtype) / x.shape[-1]
        del product
        grad_x = grad * weight.to(scale.dtype)
        grad_x.addcmul_(normalised, along.unsqueeze(-1), value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (Zhang and Sennrich 2019)."""

    recomputable = True

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., size]."""
        if x.is_cuda:
            return F.rms_norm(x, (self.size,), self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[return-value]


class LayerNorm(nn.Module):
    """Layer normalisation with a bias over the last dimension (Ba et al. 2016)."""

    recomputable = True

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
