"""`[checkpoint]`: how often state is saved and how many saved states are kept."""

from __future__ import annotations

from shardwright.spec.section import Count, Positive, Section


class CheckpointSpec(Section):
    """Saving a run's state."""

    every: Count = 100  # steps; 0: never
    keep: Positive = 2  # newest checkpoints kept
