"""Matrix products, by the fastest of the libraries for them that come with torch.

Note: fp32 on CPUs. torch's CPU builds compute fp32 products with MKL, which keeps to AVX2 on processors that are not
Intel's. oneDNN, which torch has for bf16, uses AVX-512 on all of them: 2.2 times as fast on an EPYC at the sizes of a
layer (docs/performance.md). The operator is the one that torch's compiler calls for a linear layer; it knows no
autograd, so it is used where gradients are off: inside functions that have a backward of their own, and in inference.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from shardwright.plan.machine import fp32_products_by_onednn

_FEW_ROWS = 32
"""Up to so many the weights stand on the left: measured on AVX2 at 2 to 64 rows (docs/generate.md)."""


@cache
def prefers_onednn() -> bool:
    """Whether fp32 products are made by oneDNN. A rule and not a measurement, so that a run computes the same bits
    whenever it is started."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and fp32_products_by_onednn()


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of these two is made by oneDNN, in memory of its own."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.dtype == weight.dtype == torch.float32 and prefers_onednn()


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    # Not a view for autograd, which forbids to work in place in a view that a function of one's own returns.
    y = torch.ops.mkldnn._linear_pointwise(x.flatten(0, -2), weight, None, "none", [], "")
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(weight)))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, [..., inputs] to [..., outputs], contiguous.

    With few rows, as where each sequence has one new token, the time is that of reading the weights. CPU libraries cut
    a product by the rows of the left matrix, and read the right one again for each cut; so the weights stand on the
    left.
    """
    rows = x.numel() // max(1, x.shape[-1])
    if rows > _FEW_ROWS and by_onednn(x, weight):
        return _onednn(x, weight)
    decodes = torch.is_inference_mode_enabled() and 1 < rows <= _FEW_ROWS
    if not decodes or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight)
    return (weight @ x.reshape(rows, -1).T).T.contiguous().view(*x.shape[:-1], len(weight))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b, [..., m, k] and [k, n] to [..., m, n]."""
    return _onednn(a, b.T) if by_onednn(a, b) else a @ b


def matmul_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """Write the product of two matrices into `out`, or add it to what is there. `out` may be of another dtype."""
    if out.dtype == a.dtype and not by_onednn(a, b):
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    else:
        (out.add_ if add else out.copy_)(matmul(a, b))
