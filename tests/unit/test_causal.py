"""Attention in tiles beside torch's, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shardwright.nn import causal
from shardwright.nn.causal import _Tiled, attend

SHAPES = [
    (2, 4, 4, 130, 16),
    (1, 6, 2, 128, 8),
    (3, 2, 1, 65, 64),
    (2, 4, 4, 30, 4),
    (1, 2, 2, 300, 8),
    (1, 6, 3, 515, 8),
]
"""B, H, K, T, D: lengths that tiles of every size divide and do not, groups of query heads, less than a tile."""


def made(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> tuple[list[Tensor], Tensor]:
    """q, k and v as views of one fused product, positions first in memory, and a gradient of the output."""
    b, h, k, t, d = shape
    generator = torch.Generator().manual_seed(sum(shape))
    fused = torch.randn(t, b, h + 2 * k, d, generator=generator, dtype=torch.float64).mul(scale).to(dtype)
    parts = [part.permute(1, 2, 0, 3).detach().requires_grad_() for part in fused.split([h, k, k], dim=2)]
    return parts, torch.randn(b, h, t, d, generator=generator, dtype=torch.float64).to(dtype)


def torchs(parts: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Output and gradients by torch, in fp64."""
    q, k, v = (part.detach().double().requires_grad_() for part in parts)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return [y, *torch.autograd.grad(y, (q, k, v), grad.double())]


def tiled(parts: list[Tensor], grad: Tensor) -> list[Tensor]:
    y = _Tiled.apply(*parts)
    return [y, *torch.autograd.grad(y, parts, grad)]  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype, bar", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_are_torchs_attention(shape: tuple[int, ...], dtype: torch.dtype, bar: float) -> None:
    parts, grad = made(shape, dtype)
    for own, theirs in zip(tiled(parts, grad), torchs(parts, grad), strict=True):
        assert own.dtype == dtype
        assert (own.double() - theirs).abs().max() <= bar * theirs.abs().max()


def test_heads_are_computed_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, grad = made((2, 6, 3, 150, 8), torch.float64)
    whole = tiled(parts, grad)
    monkeypatch.setattr(causal, "_MOST_SCORES", 2 * 2 * 128 * 150)  # two of the three key-value heads, then one
    groups = [(asking, asked) for _, asking, asked in causal._groups(parts[0], parts[1])]
    assert groups == [(slice(0, 4), slice(0, 2)), (slice(4, 6), slice(2, 3))] * 2
    for own, theirs in zip(tiled(parts, grad), whole, strict=True):
        assert torch.allclose(own, theirs, rtol=0, atol=1e-14)


def test_scores_far_apart_are_finite_and_right() -> None:
    """exp of what lies far below the largest score would be denormal, and is nothing beside it."""
    parts, grad = made((2, 2, 2, 100, 16), torch.float64, scale=12.0)
    for own, theirs in zip(tiled(parts, grad), torchs(parts, grad), strict=True):
        assert torch.isfinite(own).all()
        assert (own - theirs).abs().max() <= 1e-12 * theirs.abs().max()


def test_no_position_sees_a_later_one() -> None:
    (q, k, v), _ = made((1, 2, 2, 100, 16), torch.float64)
    before = _Tiled.apply(q, k, v)
    with torch.no_grad():
        k[:, :, 70:] += 5.0
        v[:, :, 70:] *= -3.0
    after = _Tiled.apply(q, k, v)
    assert torch.allclose(before[:, :, :70], after[:, :, :70], rtol=0, atol=1e-15)  # type: ignore[index]
    assert not torch.allclose(before[:, :, 70:], after[:, :, 70:])  # type: ignore[index]


def test_tiles_are_for_training_and_lengths_that_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "_pays", lambda dtype: True)
    for length, size, uses in ((128, 64, True), (127, 64, False), (2049, 64, False), (128, 32, False)):
        parts, _ = made((1, 1, 1, length, size), torch.float32)
        y = attend(*parts)
        assert ("_Tiled" in type(y.grad_fn).__name__) == uses
    parts, _ = made((1, 1, 1, 128, 64), torch.float32)
    with torch.no_grad():
        assert torch.equal(attend(*parts), F.scaled_dot_product_attention(*parts, is_causal=True))
