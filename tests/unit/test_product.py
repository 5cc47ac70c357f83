"""Matrix products by either library, beside fp64."""

from __future__ import annotations

import pytest
import torch

from shardwright.nn import product as products
from shardwright.nn.product import fast_products, matmul, matmul_into, product

EXACT = torch.backends.mkldnn.is_available() and products._onednn_is_exact()
by_onednn_alone = pytest.mark.skipif(not EXACT, reason="torch has no oneDNN here, or it would round as with AMX")


@pytest.fixture(params=[False, pytest.param(True, marks=by_onednn_alone)])
def by_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether oneDNN is the faster one."""
    monkeypatch.setattr(products, "prefers_onednn", lambda: request.param)
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("rows", [(40,), (7, 9), (1, 3)])
def test_products_are_exact_to_rounding(by_onednn: bool, rows: tuple[int, ...]) -> None:
    x, weight, grad = torch.randn(*rows, 48), torch.randn(80, 48), torch.randn(*rows, 80)
    y = product(x, weight)
    assert y.shape == (*rows, 80) and y.is_contiguous() and not y._is_view()
    assert torch.allclose(y.double(), x.double() @ weight.double().T, atol=1e-4)
    assert torch.allclose(matmul(grad, weight).double(), grad.double() @ weight.double(), atol=1e-4)
    a, b = grad.flatten(0, -2).T, x.flatten(0, -2)  # the weight's gradient: both factors are views
    assert torch.allclose(matmul(a, b).double(), a.double() @ b.double(), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_are_written_and_added(by_onednn: bool, dtype: torch.dtype) -> None:
    a, b, out = torch.randn(33, 20), torch.randn(20, 50), torch.full((33, 50), 7.0, dtype=dtype)
    whole = a.double() @ b.double()
    bar = {"atol": 0.2, "rtol": 0.02} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-5}
    matmul_into(out, a, b)
    assert torch.allclose(out.double(), whole, **bar)
    matmul_into(out, a, b, add=True)
    assert torch.allclose(out.double(), 2 * whole, **bar)


def test_products_have_gradients(by_onednn: bool) -> None:
    x, weight = torch.randn(40, 48, requires_grad=True), torch.randn(80, 48, requires_grad=True)
    product(x, weight).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, weight.sum(0).detach().expand(40, 48), atol=1e-4)


def test_torch_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    setting = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = setting.fp32_precision
    with pytest.raises(RuntimeError), fast_products(torch.device("cpu")):
        assert setting.fp32_precision == "bf16"
        torch.ones(2, 3) @ torch.ones(2, 3)  # do not fit
    assert setting.fp32_precision == before
    with fast_products(torch.device("cuda")):
        assert setting.fp32_precision == before


def test_what_was_inherited_is_inherited_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    try:
        torch.backends.fp32_precision = "tf32"
        with fast_products(torch.device("cpu")):
            pass
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        torch.backends.fp32_precision = "none"


@by_onednn_alone
def test_rounded_products_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As oneDNN would round them with AMX."""
    exact = products._onednn_is_exact.__wrapped__
    assert exact()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert exact()
    multiply = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: multiply(a.bfloat16(), b.bfloat16()).float())
    assert not exact()
