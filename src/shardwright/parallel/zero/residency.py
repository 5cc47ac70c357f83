"""Where a unit's whole tensors are, and what a ZeRO stage says of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Residency(StrEnum):
    """State of a unit's parameters on this rank."""

    OWNED = "owned"
    """Only the owned share is here."""
    GATHERING = "gathering"
    """The whole buffer is here and being filled."""
    WHOLE = "whole"
    """Every parameter may be read."""


@dataclass(frozen=True)
class ZeroStage:
    """What a ZeRO stage shards (Rajbhandari et al. 2020, section 5), as three facts.

    `per_microbatch` says whether stages 2 and 3 return to their resting state after every microbatch
    (parallel.zero_pipeline = "save_memory") or once per step ("save_communication").
    """

    number: int
    per_microbatch: bool

    @property
    def owns_state(self) -> bool:
        """Optimizer state and masters exist once per shard group."""
        return self.number >= 1

    @property
    def owns_gradients(self) -> bool:
        """Gradients rest as owned shares."""
        return self.number >= 2

    @property
    def owns_parameters(self) -> bool:
        """Parameters rest as owned shares."""
        return self.number >= 3
