"""What a forward sees: token ids and the targets they predict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORED = -1
"""A target that carries no loss."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and of targets, both int64 [sequences, sequence_length]; IGNORED targets carry no loss."""

    tokens: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def num_targets(self) -> int:
        """Targets that carry loss."""
        return int((self.targets != IGNORED).sum())

    def rows(self, start: int, stop: int) -> Batch:
        """The sequences from start to stop."""
        return Batch(self.tokens[start:stop], self.targets[start:stop])
