"""Matrix products, by the fastest of the libraries for them that come with torch.

Note: fp32 on CPUs. torch's CPU builds compute fp32 products with MKL, which keeps to AVX2 on processors that are not
Intel's. oneDNN, which torch has for bf16, uses AVX-512 on all of them: 2.2 times as fast on an EPYC at the sizes of a
layer (docs/performance.md). torch calls it for fp32 where it is allowed to multiply in bf16, which oneDNN does with AMX
and nowhere else: so it is asked for where there is no AMX, once it was seen to keep fp32, and for single products.
The setting is the process's: a thread of a user's that sets it meanwhile would be overruled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from shardwright.plan.machine import fp32_products_by_onednn

_FEW_ROWS = 32
"""Up to so many the weights stand on the left: measured on AVX2 at 2 to 64 rows (docs/generate.md)."""


@contextmanager
def _onednn() -> Iterator[None]:
    onednn = torch.backends.mkldnn
    setting = onednn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        # What it had from the setting above it, it goes on having from there.
        setting.fp32_precision = "none" if before == onednn.fp32_precision else before


@cache
def _onednn_is_exact() -> bool:
    """Whether oneDNN's product keeps what bf16 has no bits for."""
    with _onednn(), torch.autocast("cpu", enabled=False):
        odd = torch.full((2, 64, 64), 1 + 2**-12, dtype=torch.float32, device="cpu")
        return bool(torch.allclose(odd @ odd, 64 * odd.square(), rtol=2**-20))


@cache
def prefers_onednn() -> bool:
    """Whether fp32 products are made by oneDNN. A rule and not a measurement, so that a run computes the same bits
    whenever it is started."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    return torch.backends.mkl.is_available() and fp32_products_by_onednn() and _onednn_is_exact()


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Within, torch's own operators multiply fp32 matrices on a CPU by the faster library; no others are concerned."""
    if device.type != "cpu" or torch.compiler.is_compiling() or not prefers_onednn():
        yield
    else:
        with _onednn():
            yield


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, [..., inputs] to [..., outputs], contiguous.

    With few rows, as where each sequence has one new token, the time is that of reading the weights. CPU libraries cut
    a product by the rows of the left matrix, and read the right one again for each cut; so the weights stand on the
    left.
    """
    rows = x.numel() // max(1, x.shape[-1])
    decodes = torch.is_inference_mode_enabled() and 1 < rows <= _FEW_ROWS
    if decodes and bias is None and x.device.type == "cpu" and x.dtype == torch.float32:
        return (weight @ x.reshape(rows, -1).T).T.contiguous().view(*x.shape[:-1], len(weight))
    if rows <= _FEW_ROWS:
        return F.linear(x, weight, bias)
    with fast_products(x.device):
        return F.linear(x, weight, bias)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b, [..., m, k] and [k, n] to [..., m, n]."""
    with fast_products(a.device):
        return a @ b


def matmul_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """Write the product of two matrices into `out`, or add it to what is there. `out` may be of another dtype."""
    with fast_products(a.device):
        if out.dtype != a.dtype:
            (out.add_ if add else out.copy_)(a @ b)
        elif add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
