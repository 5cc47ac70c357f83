"""Memory that the process keeps for reuse.

Note: freed memory stays. glibc returns large blocks to the kernel at every free and gets fresh, unmapped pages at the
next allocation; a training step then spends time in page faults, for activations, gathered parameters and received
gradients are all allocated and freed every step. Told to keep them, it reuses the same pages, as the caching allocator
does on CUDA.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let malloc reuse what is freed instead of returning it; whether the C library could be told (glibc alone can)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
