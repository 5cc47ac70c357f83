"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.nn.function import Function
from shardwright.nn.kernels import Kernels


def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight).to(x.dtype), scale


def _normalise_backward(x: Tensor, weight: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    normalised = x * scale
    product = grad * normalised
    grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
    # The part of the gradient along x changes its length alone, which the normalisation takes away again.
    along = product @ weight.to(product.dtype) / x.shape[-1]
    del product
    grad_x = grad * weight.to(scale.dtype)
    grad_x.addcmul_(normalised, along.unsqueeze(-1), value=-1).mul_(scale)
    return grad_x.to(x.dtype), grad_weight


def _normalise_formula(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight).to(x.dtype), scale


def _normalise_backward_formula(x: Tensor, weight: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    normalised, weighted = x * scale, grad * weight.to(scale.dtype)
    along = (weighted * normalised).mean(dim=-1, keepdim=True)
    grad_weight = (grad * normalised).flatten(0, -2).sum(0)
    return ((weighted - normalised * along) * scale).to(x.dtype), grad_weight.to(weight.dtype)


@dataclass(frozen=True)
class NormKernels(Kernels):
    """Forward: (x, weight, eps) to the output and the scale of each row. Backward: (x, weight, scale, gradient of the
    output) to the gradients of x and of the weight."""

    forward: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = _normalise
    backward: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = _normalise_backward

    def formulas(self) -> NormKernels:
        """See `Kernels`."""
        return NormKernels(_normalise_formula, _normalise_backward_formula)


class _RMSNorm(Function):
    """Keeps its input and the scale of each row; a chain of operations would keep two copies of the input."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, kernels: NormKernels) -> Tensor:  # type: ignore[override]
        y, scale = kernels.forward(x, weight, eps)
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return *ctx.kernels.backward(*ctx.saved_tensors, grad), None, None


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (Zhang and Sennrich 2019)."""

    recomputable = True

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.empty(size))
        self.kernels = NormKernels()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., size]."""
        if self.kernels == NormKernels() and (x.is_cuda or not torch.is_grad_enabled()):
            # One kernel on CUDA; on CPUs a chain of operations, which a backward would keep more of than it needs.
            return F.rms_norm(x, (self.size,), self.weight, self.eps)
        return _RMSNorm.of(x, self.weight, self.eps, self.kernels)


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
