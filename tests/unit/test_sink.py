"""Gradients of rows, written where they are summed."""

from __future__ import annotations

import pytest
import torch

from shardwright.parallel.sink import GradientSink, Write


def _delivered(view: torch.Tensor, add: bool, rows: torch.Tensor, gradients: torch.Tensor) -> None:
    def deliver(write: Write) -> None:
        write(view, add)

    assert GradientSink(deliver).rows(rows, gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("add", [False, True])
def test_rows_are_torchs(dtype: torch.dtype, add: bool) -> None:
    rows, gradients = torch.tensor([3, 0, 3, 3, 5]), torch.randn(5, 4).to(dtype)
    view = torch.full((7, 4), 2.0, dtype=dtype)
    expected = torch.zeros(7, 4, dtype=torch.float64).index_add_(0, rows, gradients.double()) + 2.0 * add
    _delivered(view, add, rows, gradients)
    tolerance = {torch.bfloat16: 0.02, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(view.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_row_that_comes_often_loses_no_bits() -> None:
    """One by one, bf16 would add 1 to 256 in vain."""
    view = torch.empty(2, 1, dtype=torch.bfloat16)
    _delivered(view, False, torch.zeros(1000, dtype=torch.int64), torch.ones(1000, 1, dtype=torch.bfloat16))
    assert view.tolist() == [[1000.0], [0.0]]


def test_wider_buffers_take_narrow_gradients() -> None:
    view = torch.zeros(2, 1)
    _delivered(view, True, torch.tensor([1, 1]), torch.full((2, 1), 1.0, dtype=torch.bfloat16))
    assert view.tolist() == [[0.0], [2.0]]


def test_no_rows_make_a_zero_gradient() -> None:
    view = torch.full((2, 1), torch.nan)
    _delivered(view, False, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1))
    assert view.tolist() == [[0.0], [0.0]]


def test_a_parameter_used_twice_is_autograds() -> None:
    sink = GradientSink(lambda _: pytest.fail("delivered"))
    sink.begin_forward()
    sink.use()
    sink.use()
    assert not sink.rows(torch.tensor([0]), torch.ones(1, 1))
