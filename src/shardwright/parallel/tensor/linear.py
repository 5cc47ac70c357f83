"""Linear layers of which a rank has some rows (colwise: outputs are split) or some columns (rowwise: inputs are)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shardwright.comm.collectives import DONE, all_reduce
from shardwright.nn.function import Function
from shardwright.nn.parameters import Declaration
from shardwright.nn.product import fast_products, matmul, product
from shardwright.parallel.sink import GradientSink, sink_of
from shardwright.parallel.tensor.region import Region


class _Colwise(Function):
    """Gather, then multiply. Backward, the collective of the input's gradient runs under the weight's product."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        region: Region,
        sink: GradientSink | None,
        regathers: bool,
    ) -> Tensor:
        whole = region.gather(x, "tensor/colwise")
        ctx.save_for_backward(x if regathers else whole, weight)
        ctx.region, ctx.has_bias, ctx.sink, ctx.regathers = region, bias is not None, sink, regathers
        _announce(ctx, sink)
        if bias is None:
            return product(whole, weight)
        # With a bias F.linear gives a view of its product, and autograd forbids the rotation to work in place in a view
        # that a function of one's own returns.
        with fast_products(whole.device):
            y = torch.addmm(bias, whole.flatten(0, -2), weight.T)
        return torch.ops.aten._unsafe_view(y, (*whole.shape[:-1], len(weight)))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        whole, gathered = ctx.region.start_gather(x, "tensor/colwise/again") if ctx.regathers else (x, DONE)
        mine, handle = ctx.region.start_scatter_sum(matmul(grad, weight), "tensor/colwise/backward")
        flat = grad.flatten(0, -2)
        gathered.wait()
        grad_weight = _weight_gradient(ctx, flat, whole)
        grad_bias = flat.sum(0) if ctx.has_bias else None
        handle.wait()
        return mine, grad_weight, grad_bias, None, None, None


class _Kept(Function):
    """The input of a product, saved before the product is made.

    A recomputation ends when the last saved tensor is there again (see parallel/recompute.py). What the product itself
    would save is there only after it, with its sum over ranks, of which a layer's last one has no use.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad


class _Rowwise(Function):
    """Multiply, then sum over ranks. Backward, the gradient is gathered once for both products.

    `kept` is the node of `_Kept` that holds `x`, None where x needs no gradient.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, region: Region, sink: GradientSink | None, kept: Any
    ) -> Tensor:
        ctx.kept, ctx.weight = kept, weight
        if kept is None:
            ctx.save_for_backward(x)
        ctx.region, ctx.sink = region, sink
        _announce(ctx, sink)
        return region.scatter_sum(product(x, weight), "tensor/rowwise")

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (x,), weight = (ctx.kept or ctx).saved_tensors, ctx.weight
        ctx.kept = ctx.weight = None
        whole = ctx.region.gather(grad.contiguous(), "tensor/rowwise/backward")
        return matmul(whole, weight), _weight_gradient(ctx, whole.flatten(0, -2), x), None, None, None


def _announce(ctx: Any, sink: GradientSink | None) -> None:
    if sink is not None and ctx.needs_input_grad[1]:
        sink.use()


def _weight_gradient(ctx: Any, grad: Tensor, x: Tensor) -> Tensor | None:
    """The product of the output's gradient [tokens, outputs] and the input: delivered to the sink, or for autograd."""
    if not ctx.needs_input_grad[1]:
        return None
    a, b = grad.T, x.flatten(0, -2)
    if ctx.sink is not None and ctx.sink.product(a, b):
        return None
    return matmul(a, b)


class _SumOverHolders(torch.autograd.Function):
    """Some rows of a parameter are held by several ranks; their gradient is the sum over the holders.

    `places` are the rows' places among those of all ranks, None for rows that no other rank has.
    """

    @staticmethod
    def forward(ctx, parameter: Tensor, shared: SharedRows, region: Region) -> Tensor:  # type: ignore[override]
        ctx.shared, ctx.region = shared, region
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        shared: SharedRows = ctx.shared
        total = grad.new_zeros(shared.total, *grad.shape[1:])
        grad = grad.contiguous()
        for local, place, rows in shared.ranges:
            total[place : place + rows] = grad[local : local + rows]
        all_reduce(total, ctx.region.axis, reason="tensor/shared-heads").wait()
        for local, place, rows in shared.ranges:
            grad[local : local + rows] = total[place : place + rows]
        return grad, None, None


class SharedRows:
    """Rows that several ranks may hold: ranges (own row, place among `total` rows of all ranks, number of rows)."""

    def __init__(self, ranges: list[tuple[int, int, int]], total: int) -> None:
        self.ranges, self.total = ranges, total


class ColwiseLinear(nn.Module):
    """A rank's rows of a linear layer: [positions between products, B, inputs] to [all positions, B, own outputs]."""

    delivers_product = True

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        declaration: Declaration,
        region: Region,
        shared: SharedRows | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.declaration, self.region, self.shared = declaration, region, shared
        self.regathers = False  # whether the gathered input is kept, or gathered again in the backward

    def forward(self, x: Tensor) -> Tensor:
        """Gather and multiply."""
        weight, bias = self.weight, self.bias
        if self.shared is not None and torch.is_grad_enabled():
            weight = _SumOverHolders.apply(weight, self.shared, self.region)
            bias = bias if bias is None else _SumOverHolders.apply(bias, self.shared, self.region)
        return _Colwise.of(x, weight, bias, self.region, sink_of(weight), self.regathers)


class RowwiseLinear(nn.Module):
    """A rank's columns of a linear layer: [all positions, B, own inputs] to [positions between products, B, outputs].

    The bias is whole on every rank and added once, to the sum.
    """

    delivers_product = True

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, declaration: Declaration, region: Region
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.declaration, self.region = declaration, region

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and sum."""
        x = _Kept.of(x) if torch.is_grad_enabled() else x
        y = _Rowwise.of(x, self.weight, self.region, sink_of(self.weight), x.grad_fn)
        return y if self.bias is None else y + self.bias  # type: ignore[return-value]
