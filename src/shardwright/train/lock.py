"""One process at a time in a run directory: two would delete each other's drafts and mix their rows."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from io import TextIOWrapper
from pathlib import Path

from shardwright.errors import RunError

_PATIENCE = 3.0  # seconds: the ranks of a launcher that was just killed are ending


class RunLock:
    """Held until it is released, or this process ends, however it does. Raises RunError where another process has it.

    A file system without locks is not locked.
    """

    def __init__(self, directory: Path) -> None:
        self._file: TextIOWrapper | None = None
        try:
            self._file = (directory / ".lock").open("a+", encoding="utf-8")
        except OSError:
            return  # whatever is wrong is told by whoever writes there
        deadline = time.monotonic() + _PATIENCE
        while not self._taken():
            if time.monotonic() > deadline:
                self._file.seek(0)
                holder = self._file.read().strip() or "another process"
                raise RunError(
                    f"--run-dir: {directory} is in use by {holder}", "wait for it, end it, or give another --run-dir"
                )
            time.sleep(0.1)
        self._file.seek(0)
        self._file.truncate()
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def _taken(self) -> bool:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # no locks here
        return True

    def release(self) -> None:
        """Let others use the directory."""
        if self._file is not None:
            self._file.close()
