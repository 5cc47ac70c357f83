"""Causal grouped-query self-attention with rotary positions.

Shapes: T positions, B sequences, C hidden, H query heads, K key-value heads, D head size. Positions come first, so that
consecutive positions of all sequences are one contiguous range.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.nn.cache import LayerCache, Places
from shardwright.nn.causal import attend
from shardwright.nn.function import Function
from shardwright.nn.kernels import Kernels
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


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int) -> Tensor:
    low, high = x.view(*x.shape[:2], -1, 2, head_dim // 2).narrow(2, 0, heads).unbind(3)
    from_low = low * sin
    low.mul_(cos).addcmul_(high, sin, value=-1)
    high.mul_(cos).add_(from_low)
    return x


def _rotate_formula(x: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int) -> Tensor:
    halves = x.view(*x.shape[:2], -1, 2, head_dim // 2)
    signed_sin = torch.stack((-sin, sin), dim=3)
    turned = halves * cos.unsqueeze(3) + halves.flip(3) * signed_sin
    turns = torch.arange(halves.shape[2], device=x.device)[:, None, None] < heads
    return torch.where(turns, turned, halves).view(x.shape)


@dataclass(frozen=True)
class RotaryKernels(Kernels):
    """(x, cosine, sine, heads, size of a head) to x with its first heads rotated, as written in the memory of x."""

    rotate: Callable[[Tensor, Tensor, Tensor, int, int], Tensor] = _rotate

    def formulas(self) -> RotaryKernels:
        """See `Kernels`."""
        return RotaryKernels(_rotate_formula)


class Rotary(nn.Module):
    """Rotates pairs (i, i + D/2) of each head by an angle proportional to the position (Su et al. 2021)."""

    recomputable = True

    places: Places | None = None
    """Where the tokens stand that come next; without it they are at 0..T-1."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.kernels = RotaryKernels()
        self._tables: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def tables(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each [length, 1, 1, D / 2], in the dtype and on the device of `like`; made once."""
        key = (length, like.dtype, like.device)
        if key not in self._tables:
            positions = torch.arange(length, dtype=torch.float64, device="cpu")
            angles = torch.outer(positions, rotary_frequencies(self.architecture))[:, None, None]
            self._tables[key] = (angles.cos().to(like), angles.sin().to(like))
        return self._tables[key]

    def forward(self, x: Tensor, heads: int, head_dim: int) -> Tensor:
        """Rotate the first `heads` heads of [T, B, features] or [T, B, H, D] at their positions.

        As written that is done in place: x is used up.
        """
        cos, sin = self.tables(len(x), x) if self.places is None else self._tables_at(self.places, x)
        return _Rotated.of(x, cos, sin, heads, head_dim, self.kernels)

    def _tables_at(self, places: Places, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine at the positions of the tokens, each [T, B or 1, 1, D / 2]."""
        cos, sin = self.tables(self.architecture.max_positions, x)
        if places.common is not None:
            return cos.narrow(0, places.common, len(x)), sin.narrow(0, places.common, len(x))
        rows = places.of(len(x)).clamp(max=self.architecture.max_positions - 1)  # what fills a prompt up may lie behind
        return cos[rows, 0], sin[rows, 0]


class _Rotated(Function):
    """A rotation needs nothing of its input, and is undone by the opposite angle."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int, kernels: RotaryKernels
    ) -> Tensor:
        ctx.cos, ctx.sin, ctx.heads, ctx.head_dim, ctx.kernels = cos, sin, heads, head_dim, kernels
        rotated = kernels.rotate(x, cos, sin, heads, head_dim)
        if rotated is x:
            ctx.mark_dirty(x)
        return rotated

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        # The gradient of a view's parts was just put together, and is nobody else's.
        grad = ctx.kernels.rotate(grad.contiguous(), ctx.cos, -ctx.sin, ctx.heads, ctx.head_dim)
        return grad, None, None, None, None, None


class NoRotation(nn.Module):
    """In the place of `Rotary` where positions are learned."""

    def forward(self, x: Tensor, heads: int, head_dim: int) -> Tensor:
        """The same."""
        return x


class MergeHeads(nn.Module):
    """[B, H, T, D] to [T, B, features]."""

    recomputable = True

    def forward(self, x_BHTD: Tensor) -> Tensor:
        """A copy, where positions do not come first in memory already."""
        return x_BHTD.permute(2, 0, 1, 3).flatten(2)


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
        self.q_norm = RMSNorm(a.head_dim, a.norm_eps) if a.qk_norm else None
        self.k_norm = RMSNorm(a.head_dim, a.norm_eps) if a.qk_norm else None
        self.rotary = rotary if rotary is not None else NoRotation()
        self.repeat_kv = nn.Identity()  # consecutive query heads share a key-value head, as many each
        self.merge = MergeHeads()
        self.cache: LayerCache | None = None

    def forward(self, x_TBC: Tensor) -> Tensor:
        """Attend within each sequence, [T, B, C] to [T, B, C]; with a cache, to what it has had as well."""
        qkv = self.qkv(x_TBC)
        # How many heads of each kind there are is the product's affair.
        counts = [part.rows // self.head_dim for part in self.qkv.declaration.parts]
        if self.q_norm is None or self.k_norm is None:
            qkv = self.rotary(qkv, counts[0] + counts[1], self.head_dim)
            q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(counts, dim=2)
        else:
            q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(counts, dim=2)
            q = self.rotary(self.q_norm(q), counts[0], self.head_dim)
            k = self.rotary(self.k_norm(k), counts[1], self.head_dim)
        mask: dict[str, Any] = {}
        if self.cache is not None:
            k, v = self.cache.extend(k, v)
            mask = self.cache.mask(len(q))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, self.repeat_kv(k), self.repeat_kv(v)))
        return self.out(self.merge(attend(q, k, v) if self.cache is None else _attend_cached(q, k, v, mask)))


def _attend_cached(q_BHTD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, mask: dict[str, Any]) -> Tensor:
    """Attention to what the cache has."""
    if q_BHTD.shape[2] == 1:
        return _attend_one(q_BHTD, k_BKLD, v_BKLD, mask)
    grouped = q_BHTD.shape[1] != k_BKLD.shape[1]
    return F.scaled_dot_product_attention(q_BHTD, k_BKLD, v_BKLD, **mask, enable_gqa=grouped)


def _attend_one(q_BH1D: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, mask: dict[str, Any]) -> Tensor:
    """Attention of one position. Query heads that share a key-value head stand where positions otherwise do, so that no
    keys or values are repeated."""
    b, h, _, d = q_BH1D.shape
    grouped = q_BH1D.reshape(b, k_BKLD.shape[1], -1, d)
    return F.scaled_dot_product_attention(grouped, k_BKLD, v_BKLD, **mask).reshape(b, h, 1, d)
