"""Where a run's state comes from: a seed, the weights of another model, or its own last checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from shardwright.checkpoint.exchange.companions import TOKENIZER_FILES, copy_companions
from shardwright.checkpoint.exchange.hugging_face import HuggingFaceWeights
from shardwright.checkpoint.folder import CheckpointFolder
from shardwright.checkpoint.load import Checkpoint
from shardwright.checkpoint.resume import checked, newest_good
from shardwright.checkpoint.state import set_random_states
from shardwright.comm.mesh import Mesh
from shardwright.data.dataset import Dataset
from shardwright.data.tokenizer import Tokenizer, load_tokenizer
from shardwright.errors import CheckpointError, DataError
from shardwright.nn.initial import Values
from shardwright.optim.optimizers import SGD, AdamW, make_optimizer
from shardwright.parallel.compose import Runtime, compose
from shardwright.plan.plan import Plan
from shardwright.spec.origin import Origin, origin_of
from shardwright.train.directory import RunDirectory
from shardwright.train.lock import RunLock
from shardwright.train.loop import Standing


@dataclass(frozen=True)
class Start:
    """A run's state, ready for its next step; rank 0 holds the lock of its directory."""

    runtime: Runtime
    optimizer: AdamW | SGD
    standing: Standing
    lock: RunLock | None = None


def start(
    plan: Plan, directory: RunDirectory, mesh: Mesh, dataset: Dataset, *, resume: bool, tell: Callable[[str], None]
) -> Start:
    """Build a plan's runtime with its first values, or with those of the newest good checkpoint of its directory.

    `tell` is called on every rank with what a person should know. Raises ShardwrightError.
    """
    folder = CheckpointFolder(directory.checkpoints)
    checkpoint = newest_good(folder, mesh, tell) if resume else None
    standing = _standing(checkpoint)
    lock = None
    if mesh.rank == 0:
        lock = RunLock(directory.path)
        folder.clear()
        directory.cut(standing.step if checkpoint else -1)  # -1: the evaluation before the first step comes again too
        if checkpoint is not None:
            folder.pass_over(standing.step)
        _keep_companions(plan, directory, dataset)
    # Our own models draw no random numbers. Others draw the same ones in every run, and other ones for other data.
    torch.manual_seed(plan.spec.train.seed + mesh.topology.data_index(mesh.rank))
    runtime = compose(plan, mesh, values=checkpoint.weights if checkpoint else initial_values(plan, mesh))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    if checkpoint is not None:
        _restore(checkpoint, runtime, optimizer)
        tell(f"goes on from {checkpoint.path} at step {standing.step}{_other_data(checkpoint, runtime, dataset)}")
    elif resume:
        tell("nothing was saved yet: starts from step 0")
    return Start(runtime, optimizer, standing, lock)


def initial_values(plan: Plan, mesh: Mesh) -> Values | None:
    """The weights that `model.init_from` names, or None for those of the seed. Every byte of a checkpoint is compared
    with its checksum, by one of the ranks. Raises ShardwrightError."""
    if not plan.spec.model.init_from:
        return None
    origin, directory = origin_of(plan.spec.model.init_from)
    if origin is Origin.HUGGING_FACE:
        return HuggingFaceWeights(directory, plan.architecture)
    checkpoint, problem = checked(directory, mesh)
    if checkpoint is None:
        raise CheckpointError(f"model.init_from: {problem}", "use another checkpoint, or another copy of this one")
    return checkpoint.weights


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


def stream_of(plan: Plan, dataset: Dataset) -> str:
    """What positions are counted in: the text, cut into sequences, in an order."""
    return f"{dataset.fingerprint}, sequences of {plan.sequence_length}, seed {plan.spec.train.seed}"


def _other_data(checkpoint: Checkpoint, runtime: Runtime, dataset: Dataset) -> str:
    training = checkpoint.manifest.training
    if training is None or training.data == stream_of(runtime.plan, dataset):
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
    if dataset.tokenizer is not None and not _is_there(dataset.tokenizer, draft):
        for name in TOKENIZER_FILES:
            (draft / name).unlink(missing_ok=True)
        dataset.tokenizer.save(draft)
    draft.rename(directory.companions)


def _is_there(tokenizer: Tokenizer, companions: Path) -> bool:
    """Whether the tokenizer that is trained with is the one that came with the weights."""
    try:
        return load_tokenizer(companions).same_as(tokenizer)
    except DataError:
        return False
