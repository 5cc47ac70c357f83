"""What a run tells, as plain records. An estimate and a measurement of the same thing are the same record type."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from shardwright.units import Bytes, Seconds


class Origin(StrEnum):
    """Whether a number was predicted or observed."""

    ESTIMATED = "estimated"
    MEASURED = "measured"


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, a row of steps.jsonl. `mfu` is a share of the peak, or a text that says why it is unknown."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    num_tokens: int
    num_targets: int
    seconds: Seconds
    tokens_per_second: float
    mfu: float | str
    applied: bool

    def as_json(self) -> dict[str, Any]:
        """The row."""
        return asdict(self)


@dataclass(frozen=True)
class ValidationRecord:
    """One evaluation after `step` steps, a row of validation.jsonl. `loss` is the mean over `num_targets`."""

    step: int
    loss: float
    num_targets: int
    seconds: Seconds

    def as_json(self) -> dict[str, Any]:
        """The row."""
        return asdict(self)


@dataclass(frozen=True)
class MemoryRecord:
    """Bytes of training state that one rank holds between microbatches.

    `optimizer` includes master weights. `communication` is what transfers hold while they rest. `padding` is the part
    of all these that belongs to no parameter; an estimate from the formula has none.
    """

    origin: Origin
    rank: int
    parameters: Bytes
    gradients: Bytes
    optimizer: Bytes
    communication: Bytes
    padding: Bytes

    @property
    def total(self) -> Bytes:
        """All categories; padding is inside them."""
        return Bytes(self.parameters + self.gradients + self.optimizer + self.communication)

    def as_json(self) -> dict[str, Any]:
        """The record, with its total."""
        return {**asdict(self), "total": self.total}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> MemoryRecord:
        """The record that `as_json` wrote."""
        return MemoryRecord(**{**{k: v for k, v in fields.items() if k != "total"}, "origin": Origin(fields["origin"])})
