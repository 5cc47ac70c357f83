"""`Spec`: a whole recipe, as asked for and before anything is decided."""

from __future__ import annotations

from shardwright.spec.checkpoint import CheckpointSpec
from shardwright.spec.data import DataSpec
from shardwright.spec.memory import MemorySpec
from shardwright.spec.model import ModelSpec
from shardwright.spec.parallel import ParallelSpec
from shardwright.spec.run import RunSpec
from shardwright.spec.section import Section
from shardwright.spec.train import TrainSpec


class Spec(Section):
    """The sections of a recipe. `model` has no default: a recipe says at least what it trains."""

    model: ModelSpec
    data: DataSpec = DataSpec()
    train: TrainSpec = TrainSpec()
    parallel: ParallelSpec = ParallelSpec()
    memory: MemorySpec = MemorySpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    run: RunSpec = RunSpec()
