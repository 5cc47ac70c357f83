"""The feed-forward half of a layer."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.nn.linear import Linear
from shardwright.nn.parameters import Declaration, Part
from shardwright.spec.architecture import Architecture


class SwiGLU(nn.Module):
    """silu(x G) * (x U), then the output product (Shazeer 2020); G and U are one fused product."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        parts = (Part("gate", a.ffn), Part("up", a.ffn))
        self.gate_up = Linear(a.hidden, 2 * a.ffn, bias=a.bias, declaration=Declaration(parts, a.init_std))
        residual_std = a.init_std / math.sqrt(2 * a.layers)
        self.down = Linear(a.ffn, a.hidden, bias=a.bias, declaration=Declaration(std=residual_std))

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class GELU(nn.Module):
    """gelu(x U), tanh form, then the output product: GPT-2's."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        self.up = Linear(a.hidden, a.ffn, bias=a.bias, declaration=Declaration(std=a.init_std))
        residual_std = a.init_std / math.sqrt(2 * a.layers)
        self.down = Linear(a.ffn, a.hidden, bias=a.bias, declaration=Declaration(std=residual_std))

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def make_mlp(architecture: Architecture) -> nn.Module:
    """The feed-forward of an architecture: swiglu or gelu."""
    return {"swiglu": SwiGLU, "gelu": GELU}[architecture.activation](architecture)
