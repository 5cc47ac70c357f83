"""A tape of allocations: what is taken and dropped in which order, and the most there was at one moment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Tape:
    """Bytes that live now, in tensors of computation and in transfers' buffers, and the peaks of both.

    `peak` is of the two together, `peak_activations` of the first alone.
    """

    activations: float = 0
    transfers: float = 0
    peak_activations: float = 0
    peak: float = 0

    def take(self, size: float) -> None:
        """A tensor of computation is made."""
        self.activations += size
        self.look()

    def drop(self, size: float) -> None:
        """One is freed."""
        self.activations -= size

    def brief(self, size: float) -> None:
        """One is made and freed at once."""
        self.take(size)
        self.drop(size)

    def open(self, size: float) -> None:
        """A transfer's buffer is made."""
        self.transfers += size
        self.look()

    def close(self, size: float) -> None:
        """One is freed."""
        self.transfers -= size

    def look(self) -> None:
        """Note the peaks."""
        self.peak_activations = max(self.peak_activations, self.activations)
        self.peak = max(self.peak, self.activations + self.transfers)
