"""A pipeline schedule as data: for each rank of a pipeline, what it does in order.

The model is cut into stages, numbered in the order of the model. With several stages per rank these are what is called
virtual stages elsewhere; here every stage is one, and `placement` says which rank has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What an action does for one stage and one microbatch.

    F, B, I and W compute; B is I and W in one. The others move what is computed: S sends, R begins to receive.
    """

    FORWARD = "F"
    BACKWARD = "B"
    INPUT = "I"  # the gradient of the stage's input: what the stage before waits for
    WEIGHT = "W"  # the gradients of the stage's weights: nobody waits for them
    SEND_OUTPUT = "SF"  # the output of F, to the next stage
    RECEIVE_INPUT = "RF"  # the input of F, from the stage before
    SEND_GRADIENT = "SB"  # the gradient of the stage's input, to the stage before
    RECEIVE_GRADIENT = "RB"  # the gradient of the stage's output, from the next stage

    @property
    def computes(self) -> bool:
        """Whether it is work of the stage itself, not a transfer."""
        return self in _COMPUTE

    @property
    def sends(self) -> bool:
        """Whether it sends."""
        return self in (Kind.SEND_OUTPUT, Kind.SEND_GRADIENT)

    @property
    def receives(self) -> bool:
        """Whether it begins to receive."""
        return self in (Kind.RECEIVE_INPUT, Kind.RECEIVE_GRADIENT)


_BY_VALUE = {kind.value: kind for kind in Kind}
_COMPUTE = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.INPUT, Kind.WEIGHT})


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that a rank does. `stage` counts in the order of the model."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}@{self.stage}"

    @property
    def in_words(self) -> str:
        """As where a rank is seen: B stage 1 microbatch 3."""
        return f"{self.kind.value} stage {self.stage} microbatch {self.microbatch}"

    @staticmethod
    def from_words(text: str) -> Action | None:
        """The action of such words; None for other ones."""
        match text.split():
            case [kind, "stage", stage, "microbatch", microbatch] if kind in _BY_VALUE:
                return Action(_BY_VALUE[kind], int(stage), int(microbatch))
        return None


@dataclass(frozen=True)
class Schedule:
    """`actions[r]` is what rank r of the pipeline does, in order; stage s lives on rank `placement[s]`."""

    name: str
    placement: tuple[int, ...]
    num_microbatches: int
    actions: tuple[tuple[Action, ...], ...]

    @property
    def num_stages(self) -> int:
        """Stages of the model."""
        return len(self.placement)

    @property
    def num_ranks(self) -> int:
        """Ranks of the pipeline."""
        return len(self.actions)

    @property
    def splits_backward(self) -> bool:
        """Whether it has I and W in the place of B."""
        return any(action.kind is Kind.INPUT for actions in self.actions for action in actions)


@dataclass(frozen=True)
class StageCost:
    """What F, I and W of one microbatch cost on a stage, in any one unit; B costs I and W together."""

    forward: float = 1.0
    input: float = 1.0
    weight: float = 1.0

    def of(self, kind: Kind) -> float:
        """The cost of an action that computes; transfers cost nothing here."""
        costs = {Kind.FORWARD: self.forward, Kind.INPUT: self.input, Kind.WEIGHT: self.weight}
        return costs.get(kind, self.input + self.weight if kind is Kind.BACKWARD else 0.0)
