"""Before any rank trains: the recipe read, the data opened, the plan resolved, the directory made."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from shardwright.checkpoint.exchange.hugging_face import HuggingFaceWeights
from shardwright.checkpoint.load import Checkpoint
from shardwright.comm.machine import computes_bf16
from shardwright.data.dataset import Dataset, open_dataset
from shardwright.data.prepare import Progress as Report
from shardwright.errors import RecipeError
from shardwright.plan.host import check_host
from shardwright.plan.machine import available_memory, num_cores
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.plan.world import local_world_size
from shardwright.spec.load import load
from shardwright.spec.origin import Origin, origin_of, saved_architecture, steps_in
from shardwright.spec.spec import Spec
from shardwright.train.changes import changes_since, earlier_run
from shardwright.train.console import print_plan
from shardwright.train.directory import RunDirectory
from shardwright.train.lock import RunLock
from shardwright.train.trackers import check_installed


@dataclass(frozen=True)
class Request:
    """What was asked of `train`: a recipe with overrides, where to run it (None: a new directory), and whether to go on
    from what was saved there."""

    recipe: str
    overrides: tuple[str, ...] = ()
    run_dir: str | None = None
    resume: bool = False

    def to_json(self) -> str:
        """The request as a rank gets it."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Request:
        """The request that `to_json` wrote."""
        fields = json.loads(text)
        return Request(**fields | {"overrides": tuple(fields["overrides"])})


@dataclass(frozen=True)
class Prepared:
    """A plan and the directory of its run; `resume` says to go on from what was saved there, if anything was."""

    plan: Plan
    directory: RunDirectory
    resume: bool = False


def open_data(spec: Spec, vocab: int | None = None, progress: Report | None = None) -> Dataset:
    """The dataset of a recipe, prepared on first use. `vocab` is for data.corpus = "random", which has none of its own.

    Raises DataError.
    """
    return open_dataset(
        corpus=spec.data.corpus if isinstance(spec.data.corpus, str) else list(spec.data.corpus),
        tokenizer=spec.data.tokenizer,
        sequence_length=spec.train.sequence_length,
        validation_fraction=spec.data.validation_fraction,
        seed=spec.train.seed,
        vocab=vocab,
        progress=progress,
        separator=spec.data.separator or None,
    )


def prepare_run(request: Request, world_size: int | None, device: str) -> Prepared:
    """Everything a run needs before its ranks start, checked in the order in which a user can mend it.

    `world_size` None: as many ranks as the recipe asks for or this machine fills. Raises ShardwrightError.
    """
    earlier = earlier_run(request.recipe, request.run_dir) if request.resume else None
    spec = _spec_of(request, earlier)
    check_installed(spec.run.trackers)
    if world_size is None:
        world_size = local_world_size(spec, cores=num_cores(), gpus=torch.cuda.device_count())
    # Before the text is cut into tokens, which can take long, whatever is wrong with the layout shows already.
    if spec.data.expected_vocab is not None or spec.model.vocab is not None:
        plan_for(spec, world_size, device, None)
    vocab = None if spec.data.corpus == "random" else _open_showing_progress(spec).vocab
    plan = plan_for(spec, world_size, device, vocab)
    check_host(plan, _ranks_here(world_size), available_memory())
    changes = changes_since(earlier, plan) if earlier is not None else ()
    asked = earlier.path if earlier is not None else Path(request.run_dir) if request.run_dir else None
    if earlier is not None:
        RunLock(earlier.path).release()  # before its plan is written over; rank 0 holds it later
    _look_at_weights(plan)
    directory = RunDirectory.create(asked, Path(request.recipe), plan, again=earlier is not None)
    print_plan(plan, directory, changes)
    return Prepared(plan, directory, resume=earlier is not None)


def _spec_of(request: Request, earlier: RunDirectory | None) -> Spec:
    """The recipe. A run that goes on has its weights, and asks no more for the directory that they once came from.

    What `init_from` names is settled here, once: a run that is being written has another newest checkpoint a moment
    later.
    """
    spec = load(request.recipe, request.overrides)
    if not spec.model.init_from:
        return spec
    saved = _readable(earlier) if earlier is not None else None
    if saved is None or Path(spec.model.init_from).expanduser().exists():
        origin, saved = origin_of(spec.model.init_from)
        if origin is Origin.HUGGING_FACE:
            return spec
    return load(request.recipe, (*request.overrides, f"model.init_from={saved.resolve()}"))


def _readable(earlier: RunDirectory) -> Path | None:
    """The latest checkpoint of a run whose manifest says an architecture."""
    for path in reversed(steps_in(earlier.checkpoints)):
        with suppress(RecipeError):
            saved_architecture(path)
            return path
    return None


def _look_at_weights(plan: Plan) -> None:
    """Raises ShardwrightError where the weights to start from are not there, before a directory is made."""
    if plan.spec.model.init_from:
        origin, directory = origin_of(plan.spec.model.init_from)
        if origin is Origin.HUGGING_FACE:
            HuggingFaceWeights(directory, plan.architecture)
        else:
            Checkpoint.open(directory)


def plan_for(spec: Spec, world_size: int, device: str, vocab: int | None) -> Plan:
    """The plan of a recipe on this many ranks of this kind of machine; `vocab` is the tokenizer's."""
    own = "cuda" if device == "cuda" else "cpu"
    return resolve(
        spec,
        world_size=world_size,
        device=own,
        native_bf16=computes_bf16(own),
        tokenizer_vocab=vocab,
        local_size=int(os.environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else None,
    )


def _ranks_here(world_size: int) -> int:
    """Ranks that share this host's memory: all of them, unless who started this one says otherwise."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def _open_showing_progress(spec: Spec) -> Dataset:
    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("data", total=None, start=False)

        def report(done: int, total: int, what: str) -> None:
            bar.start_task(task)
            bar.update(task, completed=done, total=total, description=what)

        return open_data(spec, spec.model.vocab, report)
