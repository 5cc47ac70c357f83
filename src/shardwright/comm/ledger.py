"""What was sent, why, and how often: one row per (verb, axis, reason)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from shardwright.comm.whereabouts import Call, Whereabouts


@dataclass
class Traffic:
    """Calls and bytes of one kind. `sent` counts what a rank puts on the wire, ring-equivalent."""

    calls: int = 0
    sent: int = 0


@dataclass
class CommunicationLedger:
    """Counts the collectives of one rank, by (verb, axis, reason). `watcher` is told of their buffers.

    A rank that waits in one of them is seen there, by its `whereabouts`.
    """

    rows: dict[tuple[str, str, str], Traffic] = field(default_factory=dict)
    watcher: Callable[[Tensor], None] | None = None
    whereabouts: Whereabouts = field(default_factory=Whereabouts)
    _calls: dict[tuple[str, str, str], Call] = field(default_factory=dict)

    def buffer(self, tensor: Tensor) -> Tensor:
        """Say that a new tensor is a transfer's buffer, for a ledger of memory that tells them from activations."""
        if self.watcher is not None:
            self.watcher(tensor)
        return tensor

    def count(self, verb: str, axis: str, reason: str, sent: int) -> Call:
        """Add one call and the bytes that it sends; the way to wait for it."""
        row = self.rows.setdefault((verb, axis, reason), Traffic())
        row.calls += 1
        row.sent += sent
        return self.call(verb, axis, reason)

    def call(self, verb: str, axis: str, reason: str) -> Call:
        """A collective is about to be posted, also one that sends nothing: the way to wait for it."""
        found = self._calls.get((verb, axis, reason))
        if found is None:
            found = self._calls[verb, axis, reason] = Call(self.whereabouts, verb, axis, reason)
        found.begin()
        return found

    def clear(self) -> None:
        """Forget everything counted so far."""
        self.rows.clear()

    def as_records(self) -> list[dict[str, str | int]]:
        """One record per kind, for `ranks/`."""
        return [
            {"verb": verb, "axis": axis, "reason": reason, "calls": row.calls, "sent_bytes": row.sent}
            for (verb, axis, reason), row in sorted(self.rows.items())
        ]
