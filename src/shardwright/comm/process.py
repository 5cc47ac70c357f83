"""What a rank on CPUs asks of its process.

Note: freed memory stays. glibc returns large blocks to the kernel at every free and gets fresh, unmapped pages at the
next allocation; a training step then spends time in page faults, for activations, gathered parameters and received
gradients are all allocated and freed every step. Told to keep them, it reuses the same pages, as the caching allocator
does on CUDA.

Note: a batch job. gloo's thread wakes when a message comes, and by default may take the core of the very thread that
is sending. That one holds the lock that gloo's thread then asks for, over and over, until the kernel's next tick: 4 ms
for a message of 0.3. Linux lets threads of a batch job wait for a core instead of taking one. With more ranks than
cores a rank also loses its core while it sends, and gloo's thread asks for the lock through a whole slice of time:
there these threads give way to those that compute, and get a tenth of a core where all are busy.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

GIVES_WAY = 10
"""The niceness of gloo's threads where ranks share cores: 5, 10 and 19 bring the same (docs/performance.md)."""


def keep_freed_memory() -> bool:
    """Let malloc reuse what is freed instead of returning it; whether the C library could be told (glibc alone can)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def run_as_batch() -> bool:
    """Let this thread, and those that it starts from now on, be scheduled as a batch job; whether that was possible.

    Their share of the cores stays what it was.
    """
    try:
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except (AttributeError, OSError):
        return False
    return True


def transport_threads() -> list[int]:
    """The threads that gloo has by now, where the kernel tells (Linux)."""
    found, tasks = [], Path("/proc/self/task")
    for task in tasks.iterdir() if tasks.exists() else ():
        with suppress(OSError):  # it has ended since
            if (task / "comm").read_text().startswith("gloo"):
                found.append(int(task.name))
    return found


def give_way_in_transport() -> None:
    """Lower the priority of the threads that gloo has by now."""
    for thread in transport_threads():
        with suppress(OSError):  # it has ended since, or a sandbox forbids it
            if os.getpriority(os.PRIO_PROCESS, thread) < GIVES_WAY:
                os.setpriority(os.PRIO_PROCESS, thread, GIVES_WAY)
