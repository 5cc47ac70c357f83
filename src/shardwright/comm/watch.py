"""The whereabouts of a rank whose collectives are NCCL's, and a thread that looks at them.

Note: what a GPU waits in. NCCL's `wait` holds up a stream and not the host, which runs on and is held up much later,
where it reads a value. Each such wait therefore leaves an event on the stream, with the action of that moment: the
oldest event that has not come to pass is where the rank is. The thread writes that to the rank's page, and says when it
has stood there for `collective_timeout`. NCCL's own watchdog would end the process without a word; it gets a timeout
`MARGIN` longer, and is left for a rank whose Python does not run any more.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from shardwright.comm.whereabouts import Page, Sighting, Whereabouts
from shardwright.units import Seconds

MARGIN = Seconds(30.0)
_LOOK = Seconds(1.0)  # between two looks
_KEPT = 64  # events that are kept without asking whether they have come to pass


class StreamWhereabouts(Whereabouts):
    """Of a rank on a GPU: see the note."""

    def __init__(self, page: Page | None = None) -> None:
        super().__init__(page)
        self._ahead: deque[tuple[torch.Event, str, bytes, float]] = deque()
        self._spare: list[torch.Event] = []

    def pass_by(self, collective: bytes) -> None:
        """The host waits no longer; the current stream may."""
        event = self._spare.pop() if self._spare else torch.Event("cuda")  # cheaper than torch.cuda's to record
        event.record()
        self._ahead.append((event, self.doing, collective, time.monotonic()))
        if len(self._ahead) > _KEPT:
            while self._ahead and self._ahead[0][0].query():
                self._spare.append(self._ahead.popleft()[0])

    def look(self) -> Seconds:
        """Write to the page where the GPU is; how long the rank has waited in one collective."""
        for item in self._ahead.copy():
            event, doing, collective, since = item
            # An event may be in use again by now: then it has left the queue before.
            if not event.query() and any(item is other for other in self._ahead.copy()):
                self.mark_stream(doing, collective, since)
                break
        else:
            self.mark_stream("", b"", 0.0)
        seen = Sighting.of(self.page)
        return seen.seconds if seen.waiting else Seconds(0.0)


class Watch(threading.Thread):
    """Looks until it is closed; calls `overdue` when the rank has waited in one collective for longer than `limit`."""

    def __init__(self, whereabouts: StreamWhereabouts, limit: Seconds, overdue: Callable[[], object]) -> None:
        super().__init__(name="watch", daemon=True)
        self._whereabouts, self._limit, self._overdue = whereabouts, limit, overdue
        self._closing = threading.Event()

    def run(self) -> None:
        """See the class."""
        while not self._closing.wait(min(_LOOK, self._limit / 4)):
            if self._whereabouts.look() > self._limit:
                self._overdue()
                return

    def close(self) -> None:
        """Look no longer."""
        self._closing.set()
        self.join()
