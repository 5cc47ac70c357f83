"""The feed-forward half of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.nn.function import Function
from shardwright.nn.kernels import Kernels
from shardwright.nn.linear import Linear
from shardwright.nn.parameters import Declaration, Part
from shardwright.spec.architecture import Architecture


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _gated_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    activated = F.silu(gate)
    torch.mul(grad, activated, out=grad_up)
    torch.mul(grad, up, out=activated)
    torch.ops.aten.silu_backward.grad_input(activated, gate, grad_input=grad_gate)
    return grad_gate_up


def _gated_formula(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _gated_backward_formula(gate_up: Tensor, grad: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    share = gate.sigmoid()
    return torch.cat((grad * up * share * (1 + gate * (1 - share)), grad * gate * share), dim=-1)


@dataclass(frozen=True)
class GatedKernels(Kernels):
    """silu(gate) * up of a fused [..., gate and up], and the gradient of the fused tensor, written as one."""

    forward: Callable[[Tensor], Tensor] = _gated
    backward: Callable[[Tensor, Tensor], Tensor] = _gated_backward

    def formulas(self) -> GatedKernels:
        """See `Kernels`."""
        return GatedKernels(_gated_formula, _gated_backward_formula)


class _Gated(Function):
    """Its input alone is kept."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, kernels: GatedKernels) -> Tensor:  # type: ignore[override]
        ctx.kernels = kernels
        ctx.save_for_backward(gate_up)
        return kernels.forward(gate_up)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return ctx.kernels.backward(*ctx.saved_tensors, grad), None


class GatedActivation(nn.Module):
    """silu(gate) * up."""

    recomputable = True

    def __init__(self) -> None:
        super().__init__()
        self.kernels = GatedKernels()

    def forward(self, gate_up: Tensor) -> Tensor:
        """[..., 2 ffn], gate and up side by side, to [..., ffn]."""
        return _Gated.of(gate_up, self.kernels)


class TanhGELU(nn.Module):
    """gelu in its tanh form."""

    recomputable = True

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return F.gelu(x, approximate="tanh")


class SwiGLU(nn.Module):
    """silu(x G) * (x U), then the output product (Shazeer 2020); G and U are one fused product."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        parts = (Part("gate", a.ffn), Part("up", a.ffn))
        self.gate_up = Linear(a.hidden, 2 * a.ffn, bias=a.bias, declaration=Declaration(parts, a.init_std))
        self.activation = GatedActivation()
        residual_std = a.init_std / math.sqrt(2 * a.layers)
        self.down = Linear(a.ffn, a.hidden, bias=a.bias, declaration=Declaration(std=residual_std))

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]."""
        return self.down(self.activation(self.gate_up(x)))


class GELU(nn.Module):
    """gelu(x U), tanh form, then the output product: GPT-2's."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        self.up = Linear(a.hidden, a.ffn, bias=a.bias, declaration=Declaration(std=a.init_std))
        self.activation = TanhGELU()
        residual_std = a.init_std / math.sqrt(2 * a.layers)
        self.down = Linear(a.ffn, a.hidden, bias=a.bias, declaration=Declaration(std=residual_std))

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]."""
        return self.down(self.activation(self.up(x)))


def make_mlp(architecture: Architecture) -> nn.Module:
    """The feed-forward of an architecture: swiglu or gelu."""
    return {"swiglu": SwiGLU, "gelu": GELU}[architecture.activation](architecture)
