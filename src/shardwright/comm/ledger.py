"""What was sent, why, and how often: one row per (verb, axis, reason)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Traffic:
    """Calls and bytes of one kind. `sent` counts what a rank puts on the wire, ring-equivalent."""

    calls: int = 0
    sent: int = 0


@dataclass
class CommunicationLedger:
    """Counts the collectives of one rank, by (verb, axis, reason). `watcher` is told of their buffers."""

    rows: dict[tuple[str, str, str], Traffic] = field(default_factory=dict)
    watcher: Callable[[Tensor], None] | None = None

    def buffer(self, tensor: Tensor) -> Tensor:
        """Say that a new tensor is a transfer's buffer, for a ledger of memory that tells them from activations."""
        if self.watcher is not None:
            self.watcher(tensor)
        return tensor

    def count(self, verb: str, axis: str, reason: str, sent: int) -> None:
        """Add one call and the bytes that it sends."""
        row = self.rows.setdefault((verb, axis, reason), Traffic())
        row.calls += 1
        row.sent += sent

    def clear(self) -> None:
        """Forget everything counted so far."""
        self.rows.clear()

    def as_records(self) -> list[dict[str, str | int]]:
        """One record per kind, for `ranks/`."""
        return [
            {"verb": verb, "axis": axis, "reason": reason, "calls": row.calls, "sent_bytes": row.sent}
            for (verb, axis, reason), row in sorted(self.rows.items())
        ]
