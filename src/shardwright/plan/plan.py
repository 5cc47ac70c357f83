"""`Plan`: what a run will do, complete and frozen; printed at its start and stored in it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from shardwright.layout.mesh import Topology
from shardwright.spec.architecture import Architecture
from shardwright.spec.section import Positive, Section
from shardwright.spec.spec import Spec
from shardwright.spec.train import Dtype

Device = Literal["cpu", "cuda"]


def _from_json(value: Any) -> Any:
    """A topology out of plan.json, where its order is a list."""
    if not isinstance(value, dict):
        return value
    fields: dict[str, Any] = {**value, "order": tuple(value["order"])}
    return Topology(**fields)


class Plan(Section):
    """Everything resolved; nothing is decided later. `model_dump_json` and `model_validate_json` round-trip.

    `spec` stays as it was asked for, "auto" included; the fields beside it are what "auto" became. `layers_per_stage`
    counts the layers of each virtual stage in the order of the model, pp x virtual_stages of them. `decisions` says
    what each "auto" became and why, `warnings` what the user may not have wanted.
    """

    spec: Spec
    architecture: Architecture
    topology: Annotated[Topology, BeforeValidator(_from_json)]
    world_size: Positive
    device: Device
    dtype: Dtype
    grad_dtype: Dtype
    sequence_length: Positive
    num_microbatches: Positive
    layers_per_stage: tuple[Positive, ...]
    decisions: tuple[str, ...]
    warnings: tuple[str, ...]

    def __hash__(self) -> int:  # as pydantic's own, of which type checkers do not know: plans are keys of caches
        return hash(tuple(self.__dict__.values()))

    @property
    def virtual_stages(self) -> int:
        """Stages on each rank of the pipeline."""
        return len(self.layers_per_stage) // self.topology.pp

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.spec.train.global_batch_size * self.sequence_length
