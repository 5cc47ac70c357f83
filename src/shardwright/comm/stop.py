"""When a rank has to leave: asked by a signal, which the training loop reads as a flag, or left by its parent.

Note: hearing a signal inside a collective. A Python signal handler runs in the main thread between two bytecodes,
so it does not run while that thread waits inside gloo or NCCL. But the C-level handler underneath writes the
signal's number to the wakeup file descriptor at once, whatever the main thread does, and a thread of our own reads
it there. Nothing is blocked by a mask, so a process that a rank starts inherits nothing, and threads that a library
started before us (OpenBLAS's, say) cannot be chosen by the kernel to take the signal with its default action.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether this rank was asked to leave after its present step, and by which signal.

    Signals reach ranks at different moments: a loop must agree on the answer across ranks before it acts on it.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None

    @property
    def requested(self) -> str | None:
        """The name of the signal that asked, or None."""
        return self._signal.name if self._signal else None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process ended by that signal: 130 for SIGINT, 143 for SIGTERM; 0 without one."""
        return 128 + self._signal if self._signal else 0

    def request(self, number: signal.Signals) -> None:
        self._signal = number


@contextmanager
def listening(take: Callable[[signal.Signals], None]) -> Iterator[None]:
    """SIGINT and SIGTERM are handed to `take` in a thread of their own. Main thread only."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, _ignore) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.siginterrupt(number, False)  # libraries that do not expect EINTR see restarted calls instead
    thread = threading.Thread(target=_listen, args=(reader, take), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before_fd)
        os.close(writer)
        thread.join()
        os.close(reader)


def leave_now(code: int) -> NoReturn:
    """End this process at once, with what it printed, past every handler and every wait."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(code)


def follow_parent(parent: int) -> None:
    """End this process when the process `parent`, which started it, has ended, however that ended.

    The kernel's own signal reaches a rank even inside C code. It needs Linux, and would come too late if the parent
    has gone already; the thread covers both.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _ignore(number: int, frame: FrameType | None) -> None:
    """Python must have a handler for the C-level one to exist."""


def _listen(reader: int, take: Callable[[signal.Signals], None]) -> None:
    while numbers := os.read(reader, 64):
        for number in numbers:
            if number in STOP_SIGNALS:
                take(signal.Signals(number))
