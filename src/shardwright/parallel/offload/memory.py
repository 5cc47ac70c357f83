"""Host memory that a device reads and writes while others work: pinned where the device is a GPU.

Note: pinned without waste. torch's own pinned allocator rounds every size up to a power of two, up to twice what was
asked for. So whole pages are mapped, and registered with CUDA: the bytes are those of the formula. They stay registered
until their home is gone, and are freed after that.
"""

from __future__ import annotations

import mmap
import weakref
from typing import Any

import torch
from torch import Tensor

from shardwright.errors import RunError
from shardwright.units import format_bytes

_PORTABLE = 1  # pinned for every context of the process


class HostMemory:
    """Flat tensors on the host for the state of one device; `field` is what asks for them."""

    def __init__(self, device: torch.device, field: str = "memory.offload") -> None:
        self._pinned, self._field = device.type == "cuda", field
        self._registered: list[Tensor] = []
        if self._pinned:
            # The list outlives this object in the finalizer, so that memory is freed after it was unregistered.
            weakref.finalize(self, _unregister, device, self._registered).atexit = False

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor of zeros."""
        if not self._pinned:
            return torch.zeros(numel, dtype=dtype)
        num_bytes = numel * dtype.itemsize
        padded = max(-(-num_bytes // mmap.PAGESIZE), 1) * mmap.PAGESIZE
        # Pages of its own: CUDA registers none twice, and torch looks at where a storage begins.
        pages = torch.frombuffer(mmap.mmap(-1, padded), dtype=torch.uint8)
        failed = int(_cudart().cudaHostRegister(pages.data_ptr(), padded, _PORTABLE))
        if failed:
            raise RunError(
                f"{self._field}: CUDA could not pin {format_bytes(padded)} of host memory (cudaError {failed})",
                "raise the limit of locked memory (ulimit -l), or own less on each host",
            )
        self._registered.append(pages)
        return pages[:num_bytes].view(dtype)


def _cudart() -> Any:
    return torch.cuda.cudart()


def _unregister(device: torch.device, registered: list[Tensor]) -> None:
    torch.cuda.synchronize(device)  # no copy is under way in what is given back
    for pages in registered:
        _cudart().cudaHostUnregister(pages.data_ptr())
    registered.clear()
