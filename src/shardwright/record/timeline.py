"""What a rank did during one step, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from shardwright.units import Seconds


class Segment(NamedTuple):
    """What a rank did from `begin` to `end`: an action in words, or a phase of the step.

    For `waited` of that time it stood still until a message of another stage had come.
    """

    doing: str
    begin: Seconds
    end: Seconds
    waited: Seconds

    @property
    def busy(self) -> Seconds:
        """What the action itself took, collectives with other ranks of its stage included."""
        return Seconds(self.end - self.begin - self.waited)


class Wait(NamedTuple):
    """A rank, or its GPU, stood still in a collective."""

    collective: str
    begin: Seconds
    end: Seconds


@dataclass(frozen=True)
class TimelineRecord:
    """One step of one rank. Times count from the moment at which all ranks have left a barrier.

    `segments` follow one another without a gap, to the end of the step. `waits` are the longest ones, in order.
    """

    rank: int
    step: int
    segments: tuple[Segment, ...]
    waits: tuple[Wait, ...]

    @property
    def seconds(self) -> Seconds:
        """The whole step."""
        return self.segments[-1].end if self.segments else Seconds(0.0)

    def as_json(self) -> dict[str, Any]:
        """The record in short rows: a step may have 10^4 segments."""
        return {
            "step": self.step,
            "segments": [[s.doing, *(round(t, 7) for t in s[1:])] for s in self.segments],
            "waits": [[w.collective, *(round(t, 7) for t in w[1:])] for w in self.waits],
        }

    @staticmethod
    def from_json(fields: dict[str, Any], rank: int) -> TimelineRecord:
        """The record that `as_json` wrote."""
        segments = tuple(Segment(*row) for row in fields["segments"])
        return TimelineRecord(rank, fields["step"], segments, tuple(Wait(*row) for row in fields["waits"]))
