"""Where a run's state comes from: a seed, the weights of another model, or its own last checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from shardwright.checkpoint.exchange.companions import copy_companions
from shardwright.checkpoint.exchange.hugging_face import HuggingFaceWeights
from shardwright.checkpoint.folder import CheckpointFolder
from shardwright.checkpoint.load import Checkpoint
from shardwright.checkpoint.resume import newest_good
from shardwright.checkpoint.state import set_random_states
from shardwright.comm.mesh import Mesh
from shardwright.data.dataset import Dataset
from shardwright.nn.initial import Values
from shardwright.optim.optimizers import SGD, AdamW, make_optimizer
from shardwright.parallel.compose import Runtime, compose
from shardwright.plan.plan import Plan
from shardwright.spec.origin import Origin, origin_of
from shardwright.train.directory import RunDirectory
from shardwright.train.loop import Standing


@dataclass(frozen=True)
class Start:
    """A run's state, ready for its next step."""

    runtime: Runtime
    optimizer: AdamW | SGD
    standing: Standing


def start(
    plan: Plan, directory: RunDirectory, mesh: Mesh, dataset: Dataset, *, resume: bool, tell: Callable[[str], None]
) -> Start:
    """Build a plan's runtime with its first values, or with those of the newest good checkpoint of its directory.

    `tell` is called on every rank with what a person should know. Raises ShardwrightError.
    """
    folder = CheckpointFolder(directory.checkpoints)
    checkpoint = newest_good(folder, mesh, tell) if resume else None
    standing = _standing(checkpoint)
    if mesh.rank == 0:
        folder.clear()
        directory.cut(standing.step if checkpoint else -1)  # -1: the evaluation before the first step comes again too
        _keep_companions(plan, directory, dataset)
    # Our own models draw no random numbers. Others draw the same ones in every run, and other ones for other data.
    torch.manual_seed(plan.spec.train.seed + mesh.topology.data_index(mesh.rank))
    runtime = compose(plan, mesh, values=checkpoint.weights if checkpoint else initial_values(plan))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    if checkpoint is not None:
        _restore(checkpoint, runtime, optimizer)
        tell(f"goes on from {checkpoint.path} at step {standing.step}{_other_data(checkpoint, dataset)}")
    elif resume:
        tell("nothing was saved yet: starts from step 0")
    return Start(runtime, optimizer, standing)


def initial_values(plan: Plan) -> Values | None:
    """The weights that `model.init_from` names, or None for those of the seed. Raises ShardwrightError."""
    if not plan.spec.model.init_from:
        return None
    origin, directory = origin_of(plan.spec.model.init_from)
    if origin is Origin.CHECKPOINT:
        return Checkpoint.open(directory).weights
    return HuggingFaceWeights(directory, plan.architecture)


def _standing(checkpoint: Checkpoint | None) -> Standing:
    if checkpoint is None or checkpoint.manifest.training is None:
        return Standing()
    saved = checkpoint.manifest.training
    return Standing(saved.step, saved.position, saved.skipped, saved.nonfinite, saved.validated)


def _restore(checkpoint: Checkpoint, runtime: Runtime, optimizer: AdamW | SGD) -> None:
    training = checkpoint.manifest.training
    if training is None:
        return
    checkpoint.restore(runtime, optimizer)
    mesh = runtime.mesh
    if training.world_size == mesh.world.degree:
        set_random_states(checkpoint.random_states(mesh.rank), mesh.device)


def _other_data(checkpoint: Checkpoint, dataset: Dataset) -> str:
    training = checkpoint.manifest.training
    if training is None or training.data == dataset.fingerprint:
        return ""
    return f", position {training.position} of other data than before"


def _keep_companions(plan: Plan, directory: RunDirectory, dataset: Dataset) -> None:
    """Put what travels with the weights where every save finds it: once, when a run begins."""
    if directory.companions.is_dir():
        return
    draft = directory.companions.with_name(f".{directory.companions.name}")  # so that a killed start leaves no half
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    if plan.spec.model.init_from:
        origin, source = origin_of(plan.spec.model.init_from)
        source = Checkpoint.open(source).companions if origin is Origin.CHECKPOINT else source
        copy_companions(source, draft)
    if dataset.tokenizer is not None and not _has_tokenizer(draft):
        dataset.tokenizer.save(draft)
    draft.rename(directory.companions)


def _has_tokenizer(companions: Path) -> bool:
    return any((companions / name).exists() for name in ("tokenizer.json", "shardwright-tokenizer.json"))
