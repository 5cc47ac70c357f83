"""Note: staged exchange. gloo moves host memory alone, so what GPU tensors exchange over it passes through the host.

The input is copied to pinned memory when a verb is called, and the host waits for that copy, because only then can the
message leave; the exchange is the one that CPU tensors have. The result is copied back by the handle's `wait`, on the
stream that is current there. NCCL does better wherever it can be used: it needs a GPU for every rank. This is for ranks
that share one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def host_like(tensor: Tensor) -> Tensor:
    """Host memory for the values of a tensor. A GPU's is pinned, and reused by its allocator when copies are done."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def fetch(tensor: Tensor, host: Tensor) -> None:
    """Copy a tensor's values, as the current stream has them, into host memory; they are there on return."""
    host.copy_(tensor.detach(), non_blocking=True)
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


def fetched(tensor: Tensor) -> Tensor:
    """A copy of a tensor in host memory."""
    host = host_like(tensor)
    fetch(tensor, host)
    return host


def put_back(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy each (tensor, host) back to the tensor, in the order of the current stream."""
    with torch.no_grad():
        for tensor, host in copies:
            tensor.copy_(host, non_blocking=True)
