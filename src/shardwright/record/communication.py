"""What a rank sends, as records: estimated for one step, or measured over several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardwright.record.records import Origin
from shardwright.units import Bytes


@dataclass(frozen=True)
class CommunicationRecord:
    """What one rank sends by one verb along one axis of the mesh for one reason: how often, and bytes in all.

    Bytes are those that the ring forms of collectives put on the wire, whatever carries them.
    """

    origin: Origin
    rank: int
    verb: str
    axis: str
    reason: str
    calls: int
    sent: Bytes

    def as_row(self) -> dict[str, str | int]:
        """The row that a rank's ledger has for it."""
        return {
            "verb": self.verb,
            "axis": self.axis,
            "reason": self.reason,
            "calls": self.calls,
            "sent_bytes": self.sent,
        }

    @staticmethod
    def of_row(row: Mapping[str, Any], rank: int, origin: Origin = Origin.MEASURED) -> CommunicationRecord:
        """The record of a ledger's row, or of one that `as_row` made."""
        sent = Bytes(int(row["sent_bytes"]))
        return CommunicationRecord(origin, rank, row["verb"], row["axis"], row["reason"], int(row["calls"]), sent)
