"""Orders of work beside the main one: CUDA streams; on CPUs the main order itself, in which nothing is ever under way.

Note: who waits for whom. Work in a lane runs in the order in which it was started. A `Mark` is a moment in that order.
Another lane, or whatever runs after `wait`, goes on when the device has come to it, and the host does not stop; only
`finish` stops the host. The same lines run on CPUs, where every copy is complete when it returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Mark:
    """A moment in a lane; a `Handle` (see comm/collectives.py). Without an event it has passed."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        self._event = event

    def wait(self) -> None:
        """Let the current stream wait for the moment."""
        if self._event is not None:
            self._event.wait()

    def finish(self) -> None:
        """Let the host wait for it."""
        if self._event is not None:
            self._event.synchronize()


class Lane:
    """An order of work on a device."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def running(self, *, after: Mark) -> Iterator[None]:
        """What is started inside runs in the lane, after a mark of another."""
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                after.wait()
                yield

    def mark(self) -> Mark:
        """The moment at which all that was started so far is done."""
        if self._stream is None:
            return Mark()
        event = torch.cuda.Event()
        event.record(self._stream)
        return Mark(event)


def enter_thread(device: torch.device) -> None:
    """Let the thread that runs this work for a device: CUDA's current device is a thread's own."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def here(device: torch.device) -> Mark:
    """The moment at which all that was started so far in the current order is done."""
    if device.type != "cuda":
        return Mark()
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return Mark(event)
