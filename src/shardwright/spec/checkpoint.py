"""`[checkpoint]`: how often state is saved and how many saved states are kept."""

from __future__ import annotations

from typing import Literal

from shardwright.spec.section import Count, Positive, Section


class CheckpointSpec(Section):
    """Saving a run's state."""

    every: Count = 100  # steps; 0: never, not even at the end
    keep: Positive = 2  # newest checkpoints kept
    on_error: Literal["continue", "stop"] = "continue"  # when one cannot be written
