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
class SaveRecord:
    """One checkpoint, a row of checkpoints.jsonl: its bytes on the disk, how long the loop stood still for it, and how
    long it took until it was complete, with training going on."""

    step: int
    bytes: Bytes
    stall: Seconds
    seconds: Seconds

    def as_json(self) -> dict[str, Any]:
        """The row."""
        return asdict(self)


_NONE = Bytes(0)


@dataclass(frozen=True)
class MemoryRecord:
    """Bytes that one rank holds.

    On the device, between microbatches: `parameters`; `gradients`; `optimizer`, master weights included;
    `communication`, what transfers hold while they rest; `offload`, the buffers through which offloaded state streams.
    `padding` is the part of all these that belongs to no parameter. `activations` is the most that a step adds to them
    in tensors of computation at one moment, and `peak` the most that is live at one moment in all, transfers included.
    `host` is what offload keeps in host memory.
    """

    origin: Origin
    rank: int
    parameters: Bytes
    gradients: Bytes
    optimizer: Bytes
    communication: Bytes
    padding: Bytes
    offload: Bytes = _NONE
    activations: Bytes = _NONE
    peak: Bytes = _NONE
    host: Bytes = _NONE

    @property
    def total(self) -> Bytes:
        """What rests on the device between microbatches; padding is inside it."""
        return Bytes(self.parameters + self.gradients + self.optimizer + self.communication + self.offload)

    def as_json(self) -> dict[str, Any]:
        """The record, with its total."""
        return {**asdict(self), "total": self.total}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> MemoryRecord:
        """The record that `as_json` wrote."""
        return MemoryRecord(**{**{k: v for k, v in fields.items() if k != "total"}, "origin": Origin(fields["origin"])})
