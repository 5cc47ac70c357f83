"""Causal grouped-query self-attention with rotary positions.

Shapes: T positions, B sequences, C hidden, H query heads, K key-value heads, D head size. Positions come first, so that
consecutive positions of all sequences are one contiguous range.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.nn.linear import Linear
from shardwright.nn.norm import RMSNorm
from shardwright.nn.parameters import Declaration, Part
from shardwright.spec.architecture import Architecture


def rotary_frequencies(architecture: Architecture) -> Tensor:
    """Angles per position, float64 [D / 2], with Llama 3's scaling of the long wavelengths where it is asked for."""
    d = architecture.head_dim
    frequencies = architecture.rope_theta ** (-torch.arange(0, d, 2, dtype=torch.float64, device="cpu") / d)
    scaling = architecture.rope_scaling
    if scaling is None:
        return frequencies
    wavelength = 2 * math.pi / frequencies
    # Smooth between the wavelengths kept as they are and those stretched by `factor` (Llama 3.1's release).
    ratio = scaling.original_max_positions / wavelength
    smooth = (ratio - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return frequencies * (smooth + (1 - smooth) / scaling.factor)


class Rotary(nn.Module):
    """Rotates pairs (i, i + D/2) of each head by an angle proportional to the position (Su et al. 2021)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self._tables: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def tables(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each [length, 1, 1, D / 2], in the dtype and on the device of `like`; made once."""
        key = (length, like.dtype, like.device)
        if key not in self._tables:
            positions = torch.arange(length, dtype=torch.float64, device="cpu")
            angles = torch.outer(positions, rotary_frequencies(self.architecture))[:, None, None]
            self._tables[key] = (angles.cos().to(like), angles.sin().to(like))
        return self._tables[key]

    def forward(self, x_TBHD: Tensor) -> Tensor:
        """Rotate queries or keys [T, B, H, D] at positions 0..T-1."""
        cos, sin = self.tables(len(x_TBHD), x_TBHD)
        low, high = x_TBHD.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention: one fused product for query, key and value, then the output product."""

    def __init__(self, architecture: Architecture, rotary: Rotary | None) -> None:
        super().__init__()
        a = architecture
        self.head_dim = a.head_dim
        q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        parts = (Part("q", q), Part("k", kv), Part("v", kv))
        self.qkv = Linear(a.hidden, q + 2 * kv, bias=a.bias or a.qkv_bias, declaration=Declaration(parts, a.init_std))
        # Products that feed the residual stream start smaller, by the number of them (Radford et al. 2019).
        residual_std = a.init_std / math.sqrt(2 * a.layers)
        self.out = Linear(q, a.hidden, bias=a.bias, declaration=Declaration(std=residual_std))
        self.q_norm = RMSNorm(a.head_dim, a.norm_eps) if a.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(a.head_dim, a.norm_eps) if a.qk_norm else nn.Identity()
        self.rotary = rotary if rotary is not None else nn.Identity()
        self.repeat_kv = nn.Identity()  # consecutive query heads share a key-value head, as many each

    def forward(self, x_TBC: Tensor) -> Tensor:
        """Attend within each sequence, [T, B, C] to [T, B, C]."""
        qkv = self.qkv(x_TBC)
        heads = qkv.view(*qkv.shape[:2], -1, self.head_dim)
        # How many heads of each kind there are is the product's affair.
        q, k, v = heads.split([part.rows // self.head_dim for part in self.qkv.declaration.parts], dim=2)
        q, k = self.rotary(self.q_norm(q)), self.rotary(self.k_norm(k))
        k, v = self.repeat_kv(k), self.repeat_kv(v)
        attended_BHTD = F.scaled_dot_product_attention(
            *(x.permute(1, 2, 0, 3) for x in (q, k, v)), is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
        )
        return self.out(attended_BHTD.permute(2, 0, 1, 3).flatten(2))
