"""The fused head and cross-entropy against torch's own, chunk by chunk and gradient by gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from shardwright.data.batch import IGNORED
from shardwright.nn import loss
from shardwright.nn.loss import linear_cross_entropy


def inputs(tokens: int, hidden: int, vocab: int, ignored: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    w = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = IGNORED
    return h.requires_grad_(), w.requires_grad_(), targets


def torchs(h: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(h @ w.T, targets, ignore_index=IGNORED, reduction="sum")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "chunk_tokens", lambda _vocab, _device: 5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("tokens", [1, 4, 5, 6, 10, 23])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_loss_and_gradients_are_torchs(tokens: int, ignored: float) -> None:
    h, w, targets = inputs(tokens, 7, 11, ignored)
    ours = linear_cross_entropy(h, w, targets)
    expected = torchs(h, w, targets)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(ours * 0.37, (h, w))
    want = torch.autograd.grad(expected * 0.37, (h, w))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    if ignored == 1.0:
        assert float(ours.detach()) == 0 and not got[0].any() and not got[1].any()


@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 20), st.integers(0, 100))
@settings(deadline=None)
def test_any_sizes(tokens: int, hidden: int, vocab: int, seed: int) -> None:
    h, w, targets = inputs(tokens, hidden, vocab, seed=seed)
    torch.testing.assert_close(linear_cross_entropy(h, w, targets), torchs(h, w, targets), rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("small_chunks")
def test_gradcheck() -> None:
    h, w, targets = inputs(12, 3, 4)
    assert torch.autograd.gradcheck(lambda a, b: linear_cross_entropy(a, b, targets), (h, w))


@pytest.mark.usefixtures("small_chunks")
def test_only_what_needs_a_gradient_gets_one() -> None:
    h, w, targets = inputs(12, 3, 4)
    expected = torch.autograd.grad(torchs(h, w, targets), (h, w))
    (only_h,) = torch.autograd.grad(linear_cross_entropy(h, w.detach(), targets), (h,))
    (only_w,) = torch.autograd.grad(linear_cross_entropy(h.detach(), w, targets), (w,))
    torch.testing.assert_close((only_h, only_w), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        total = linear_cross_entropy(h, w, targets)
    assert not total.requires_grad
    torch.testing.assert_close(total, torchs(h, w, targets).detach())


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("tokens", [50, 32, 31])
def test_bf16_is_close_and_its_loss_is_fp32(tokens: int) -> None:
    h, w, targets = inputs(tokens, 16, 30)
    expected = torchs(h, w, targets)
    want = torch.autograd.grad(expected, (h, w))
    low_h, low_w = (t.detach().bfloat16().requires_grad_() for t in (h, w))
    ours = linear_cross_entropy(low_h, low_w, targets)
    assert ours.dtype == torch.float32
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=0.01)
    for got, exact in zip(torch.autograd.grad(ours, (low_h, low_w)), want, strict=True):
        assert got.dtype == torch.bfloat16
        assert float((got.double() - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("hidden", [16, 200])
def test_many_chunks_lose_no_more_of_bf16_than_one(monkeypatch: pytest.MonkeyPatch, hidden: int) -> None:
    """Their sum is made in fp32, and where there are few tokens in one product."""
    h, w, targets = inputs(400, hidden, 30)
    (exact,) = torch.autograd.grad(torchs(h, w, targets), (w,))
    low_h, low_w = h.detach().bfloat16(), w.detach().bfloat16().requires_grad_()
    errors = []
    for tokens in (400, 2):
        monkeypatch.setattr(loss, "chunk_tokens", lambda _vocab, _device, tokens=tokens: tokens)
        (got,) = torch.autograd.grad(linear_cross_entropy(low_h, low_w, targets), (low_w,))
        errors.append(float((got.double() - exact).norm() / exact.norm()))
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.usefixtures("small_chunks")
def test_large_logits_do_not_overflow() -> None:
    h, w, targets = inputs(12, 3, 4)
    h, w = (h.detach() * 1e4).float().requires_grad_(), w.detach().float().requires_grad_()
    ours = linear_cross_entropy(h, w, targets)
    torch.testing.assert_close(ours, torchs(h, w, targets), rtol=1e-5, atol=1e-3)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(ours, (h, w)))


def test_a_chunk_is_bounded_in_elements_and_never_tiny() -> None:
    assert loss.chunk_tokens(8192, "cpu") * 8192 <= 1 << 21
    assert loss.chunk_tokens(1 << 30, "cpu") == 64
    assert loss.chunk_tokens(128256, "cuda") > loss.chunk_tokens(128256, "cpu")
