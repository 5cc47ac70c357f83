"""When a rank did what it says on its page (`whereabouts.py`), for one step.

Note: whose time. On CPUs it is the host's. A GPU does later what the host has told it, so there a mark is an event on
the current stream. A wait is one there as well: the stream stands still between its two marks while a collective is
under way. Events are read when the step is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from shardwright.record.timeline import Segment, TimelineRecord, Wait
from shardwright.units import Seconds

_MOST_WAITS = 5000
_SHORTEST_WAIT = 2e-5  # seconds; posting a collective takes about as long
_OF_THE_PIPELINE = b" for pipeline/"

_Mark = float | torch.cuda.Event


class Recorder:
    """Marks the time at every change of whereabouts. Made right after a barrier."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._now: Callable[[], _Mark] = time.perf_counter if device.type != "cuda" else _event
        self._begun: list[tuple[str, _Mark]] = []
        self._waits: list[tuple[bytes, _Mark, _Mark]] = []
        self._entered: tuple[bytes, _Mark] | None = None
        self._zero = self._now()

    def begin(self, doing: str) -> None:
        """The rank does something else from now on."""
        self._begun.append((doing, self._now()))

    def enter(self, collective: bytes) -> None:
        """It begins to wait."""
        self._entered = collective, self._now()

    def leave(self) -> None:
        """It waits no longer."""
        if self._entered is not None:
            self._waits.append((*self._entered, self._now()))
            self._entered = None

    def record(self, rank: int, step: int) -> TimelineRecord:
        """The step, which ends now."""
        end = self._now()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        begins = [self._since(mark) for _, mark in self._begun]
        waits = [(text, self._since(a), self._since(b)) for text, a, b in self._waits]
        segments = _segments([doing for doing, _ in self._begun], begins, self._since(end), waits)
        long = [wait for wait in waits if wait[2] - wait[1] >= _SHORTEST_WAIT]
        kept = sorted(sorted(long, key=lambda wait: wait[1] - wait[2])[:_MOST_WAITS], key=lambda wait: wait[1])
        return TimelineRecord(rank, step, segments, tuple(Wait(text.decode(), a, b) for text, a, b in kept))

    def _since(self, mark: _Mark) -> Seconds:
        if isinstance(mark, torch.cuda.Event) and isinstance(self._zero, torch.cuda.Event):
            return Seconds(self._zero.elapsed_time(mark) / 1e3)
        assert isinstance(mark, float) and isinstance(self._zero, float), "marks are of one clock"
        return Seconds(mark - self._zero)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _segments(
    doings: Sequence[str], begins: Sequence[Seconds], end: Seconds, waits: Sequence[tuple[bytes, Seconds, Seconds]]
) -> tuple[Segment, ...]:
    """What was done from each begin to the next, with the waits for other stages that lie in it."""
    ends, made, index = [*begins[1:], end], [], 0
    for doing, begin, until in zip(doings, begins, ends, strict=True):
        waited = 0.0
        while index < len(waits) and waits[index][1] < until:
            text, a, b = waits[index]
            waited += b - a if _OF_THE_PIPELINE in text else 0.0
            index += 1
        made.append(Segment(doing, begin, until, Seconds(min(waited, until - begin))))
    return tuple(made)
