"""Where a rank is: the action or phase that it performs, and the collective in which it waits.

Note: seen from outside. A rank that hangs cannot tell where, and one that was killed no longer can. So each writes its
whereabouts into a page of memory at every step on its way. On one machine it is a page of a file, which the launcher
reads whatever has become of the rank; elsewhere a thread of the rank reads it (`board.py`). Writing copies 128 bytes,
without a system call. A wait that failed leaves the page as it is: what the rank does on its way out would only cover
what it waited for.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shardwright.units import Seconds

_LINE = struct.Struct("=d120s")  # since when, on the clock that all processes of a machine share; a text
_DOING, _WAITING, _STREAM_DOING, _STREAM_WAITING = range(0, 4 * _LINE.size, _LINE.size)
SIZE = 4 * _LINE.size

Page = bytearray | mmap.mmap


def shared_page(path: Path) -> Page:
    """The page that is a new file: another process may read it at any time."""
    path.write_bytes(bytes(SIZE))
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), SIZE)


@dataclass(frozen=True)
class Sighting:
    """Where a rank was seen: what it did, the collective in which it waited ("" for none), and for how long."""

    doing: str
    waiting: str
    seconds: Seconds

    @classmethod
    def of(cls, page: Page | bytes) -> Sighting:
        """What a page shows now. The rank may be writing: two looks have to agree."""
        content = page[:SIZE]
        while content != (again := page[:SIZE]):
            content = again
        (began, doing), (moved, waiting) = (_line(content, offset) for offset in (_DOING, _WAITING))
        stream = _line(content, _STREAM_WAITING)
        if stream[1]:
            (moved, waiting), doing = stream, _line(content, _STREAM_DOING)[1]
        return cls(doing, waiting, Seconds(time.monotonic() - (moved if waiting else max(began, moved))))


def _line(content: bytes | bytearray, offset: int) -> tuple[float, str]:
    since, text = _LINE.unpack_from(content, offset)
    return since, text.rstrip(b"\0").decode(errors="replace")


class Listener(Protocol):
    """Is told of every change, as `recorder.py`."""

    def begin(self, doing: str) -> None:
        """See `Whereabouts`."""
        ...

    def enter(self, collective: bytes) -> None:
        """See `Whereabouts`."""
        ...

    def leave(self) -> None:
        """See `Whereabouts`."""
        ...


class Whereabouts:
    """Says on a page where this rank is. Without one given, on its own, which nobody else sees."""

    def __init__(self, page: Page | None = None) -> None:
        self.page: Page = bytearray(SIZE) if page is None else page
        self.doing = ""
        self.listener: Listener | None = None
        self._written = self.page
        self.begin("start")

    def begin(self, doing: str) -> None:
        """What this rank does from now on: an action of its schedule, or a phase outside it."""
        self.doing = doing
        _LINE.pack_into(self._written, _DOING, time.monotonic(), doing.encode())
        if self.listener is not None:
            self.listener.begin(doing)

    def enter(self, collective: bytes) -> None:
        """The rank begins to wait."""
        _LINE.pack_into(self._written, _WAITING, time.monotonic(), collective)
        if self.listener is not None:
            self.listener.enter(collective)

    def leave(self) -> None:
        """It waits no longer."""
        _LINE.pack_into(self._written, _WAITING, time.monotonic(), b"")
        if self.listener is not None:
            self.listener.leave()

    def pass_by(self, collective: bytes) -> None:
        """The host has waited for a collective: with gloo it is over then, with NCCL see `watch.py`."""

    def freeze(self) -> None:
        """A wait has failed: the page stays as it is (see the note)."""
        self._written = bytearray(SIZE)

    def mark_stream(self, doing: str, collective: bytes, since: float) -> None:
        """Where the rank's GPU is, which counts before where its host is; b"" where it waits in no collective."""
        _LINE.pack_into(self._written, _STREAM_DOING, since, doing.encode())
        _LINE.pack_into(self._written, _STREAM_WAITING, since, collective)


class Waitable(Protocol):
    """What torch has under way."""

    def wait(self) -> object:
        """Finish it."""
        ...


class Call:
    """One kind of collective that a rank can be seen in: a verb along an axis for a reason."""

    def __init__(self, whereabouts: Whereabouts, verb: str, axis: str, reason: str) -> None:
        self._whereabouts, self._text = whereabouts, f"{verb} along {axis} for {reason}".encode()

    def begin(self) -> None:
        """It is about to be posted. NCCL connects ranks at the first collective between them, and waits for them."""
        self._whereabouts.enter(self._text)

    def posted(self) -> None:
        """It is under way."""
        self._whereabouts.leave()

    def wait(self, works: Sequence[Waitable]) -> None:
        """Wait for all of them, and be seen in it."""
        where = self._whereabouts
        where.enter(self._text)
        try:
            for work in works:
                work.wait()
        except BaseException:
            where.freeze()
            raise
        where.leave()
        where.pass_by(self._text)
