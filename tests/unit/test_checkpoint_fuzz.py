"""Damaged checkpoints and model directories by the hundred: each is a clear error, and does nothing else."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutations
import pytest
import torch
from mutations import Mutation, tensor_files, trap_of
from torch import Tensor

from shardwright.checkpoint import files
from shardwright.checkpoint.exchange.export import export
from shardwright.checkpoint.exchange.hugging_face import HuggingFaceWeights
from shardwright.checkpoint.folder import CheckpointFolder
from shardwright.checkpoint.load import Checkpoint
from shardwright.checkpoint.manifest import Training
from shardwright.checkpoint.save import Saver
from shardwright.checkpoint.state import num_updates
from shardwright.comm.mesh import Mesh
from shardwright.data.samples import RandomSamples
from shardwright.errors import CheckpointError, ShardwrightError
from shardwright.layout.box import Box
from shardwright.layout.mesh import Topology
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import compose
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.spec.load import build
from shardwright.spec.origin import saved_architecture
from shardwright.train.batches import batch_at
from shardwright.train.step import train_step

EACH = 20  # inputs of every kind
ROOM = 256 << 20  # bytes of address space that reading a copy may take
SECONDS = 5.0  # of processor time that it may take
RECIPE = {
    "model": {"layers": 1, "hidden": 8, "heads": 2, "ffn": 12, "vocab": 19},
    "train": {"dtype": "fp32", "sequence_length": 5, "global_batch_size": 2, "micro_batch_size": 2},
}

Tensors = dict[tuple[str, str], Tensor]


# Whole directories


def save_one(folder: Path) -> Plan:
    """A checkpoint of two steps on one rank; its plan."""
    plan = resolve(build(RECIPE), world_size=1, device="cpu", native_bf16=True, tokenizer_vocab=None)
    runtime = compose(plan, Mesh(Topology(), torch.device("cpu")))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, seed=5)
    for step in range(2):
        train_step(runtime, optimizer, batch_at(runtime, samples, 2 * step), 1e-2)
    saver = Saver(CheckpointFolder(folder), runtime, optimizer, folder / "no companions")
    where = {"step": 2, "position": 4, "updates": num_updates(runtime, optimizer), "world_size": 1}
    saver.save(Training(optimizer="adamw", seed=0, data="random", **where))
    saver.drain()
    return plan


def read_checkpoint(path: Path) -> Tensors:
    """Everything in a checkpoint, as whole tensors."""
    with suppress(ShardwrightError):  # it looks at less
        saved_architecture(path)
    checkpoint = Checkpoint.open(path)
    checkpoint.check()
    found = {("", key): state for key, state in checkpoint.random_states(0)}
    for (kind, name), stored in checkpoint.stored.items():
        box = Box.whole(stored[0].box.tensor)
        found[kind, name] = torch.empty(box.size)
        checkpoint.kind(kind).read(box, found[kind, name])
    return found


@dataclass(frozen=True)
class Original:
    """A whole directory, what is in it, and how that is read. `follows`: its files may be links, as all are in the
    cache of Hugging Face."""

    path: Path
    read: Callable[[Path], Tensors]
    tensors: Tensors
    follows: bool


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Original]:
    """By name: a checkpoint, and Hugging Face directories of the same weights in one file and in several."""
    folder = tmp_path_factory.mktemp("whole")
    plan = save_one(folder)
    saved = folder / "step-00000002"
    weights = Checkpoint.open(saved).weights
    export(weights, plan.architecture, folder / "one")
    export(weights, plan.architecture, folder / "shards", max_shard_bytes=1000)
    boxes = [box for _, entry, box in Checkpoint.open(saved).manifest.boxes() if entry.kind == "weights"]

    def read_model(path: Path) -> Tensors:
        values, found = HuggingFaceWeights(path, plan.architecture), {}
        for box in boxes:
            found["weights", box.name] = torch.empty(box.size)
            values.read(box, found["weights", box.name])
        return found

    readers = {"step-00000002": read_checkpoint, "one": read_model, "shards": read_model}
    return {
        name: Original(folder / name, read, read(folder / name), read is read_model) for name, read in readers.items()
    }


# What reading a copy may do

_opened: list[str] | None = None
_CODE = ("exec", "compile", "import", "pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            _opened.append(os.fsdecode(arguments[0]))
        elif event in _CODE:
            _opened.append(f"{event} {arguments}")


sys.addaudithook(_audit)


@contextmanager
def bounded(allowed: set[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file but those allowed is opened, no code run, little memory asked for, little time taken."""
    global _opened
    inner = files.safe_open
    opened: list[str] = []

    def noted(path: Path, framework: str) -> Any:  # it opens files past Python
        opened.append(str(path))
        return inner(path, framework=framework)

    monkeypatch.setattr(files, "safe_open", noted)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, limits[1]))
    began, _opened = time.process_time(), opened
    try:
        yield
    finally:
        _opened = None
        resource.setrlimit(resource.RLIMIT_AS, limits)
        monkeypatch.undo()
    assert time.process_time() - began < SECONDS
    assert [name for name in opened if os.path.realpath(name) not in allowed] == []


def outcome(original: Original, copy: Path, monkeypatch: pytest.MonkeyPatch) -> ShardwrightError | None:
    """The error that reading a copy raises; None where all is there as it was."""
    found, error = {}, None
    own = [path for path in copy.iterdir() if original.follows or not path.is_symlink()]
    with bounded({os.path.realpath(path) for path in own}, monkeypatch):
        try:
            found = original.read(copy)
        except ShardwrightError as raised:
            error = raised
    assert not trap_of(copy).exists()
    if error is None:
        assert found.keys() == original.tensors.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in original.tensors.items())
        if not original.follows and signature(copy) == signature(original.path):
            assert Checkpoint.open(copy).manifest == Checkpoint.open(original.path).manifest
    return error


def signature(path: Path) -> str:
    return mutations.read(path)["checksum"]


def check(original: Original, mutation: Mutation, seed: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage copies until EACH of them can be told from the original; every one of these is a clear error."""
    copy, outside, told = folder / "copy", folder / "outside", 0
    shutil.copytree(original.path, outside)
    for number in range(20 * EACH):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(original.path, copy)
        mutation(random.Random(f"{seed} {number}"), copy)
        try:
            error = outcome(original, copy, monkeypatch)
        except BaseException as problem:
            problem.add_note(f"input {number} of {seed}")
            raise
        if error is not None:
            where = error.problem.removeprefix(str(folder))
            assert where != error.problem or error.problem.startswith(("model.", "config")), error.problem
            assert len(where) < 700 and where.encode(errors="backslashreplace").decode().isprintable(), error.problem
            assert error.way_out and error.way_out.isprintable()
            told += 1
        if told == EACH:
            return
    raise AssertionError(f"only {told} of {20 * EACH} inputs of {seed} were told from the original")


def of_a_file(change: Callable[[random.Random, Path], object], signed: bool = False) -> Mutation:
    def mutation(draw: random.Random, copy: Path) -> None:
        change(draw, draw.choice(tensor_files(copy)))
        if signed:
            mutations.sign_files(copy)

    return mutation


def of(name: str, change: Callable[[random.Random, Path], object]) -> Mutation:
    return lambda draw, copy: change(draw, copy / name)


def of_json(name: str) -> Mutation:
    def mutation(draw: random.Random, copy: Path) -> None:
        content = json.loads((copy / name).read_text())
        mutations.disturb(draw, content)
        (copy / name).write_text(json.dumps(content))

    return mutation


def shard_name(draw: random.Random, copy: Path) -> None:
    path = copy / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    places = content["weight_map"]
    key = draw.choice(sorted(places))
    places[key] = draw.choice([*(name.format(places[key]) for name in mutations.NAMES), *mutations.JUNK])
    path.write_text(json.dumps(content))


CHECKPOINT: dict[str, Mutation] = {
    "manifest cut short": of("manifest.json", mutations.cut_short),
    "manifest flipped": of("manifest.json", mutations.flipped),
    "manifest grown": of("manifest.json", mutations.grown),
    "manifest exchanged": of("manifest.json", mutations.exchanged),
    "manifest disturbed": mutations.disturbed,
    "manifest disturbed and signed": mutations.disturbed_and_signed,
    "fields": mutations.field,
    "file names": mutations.file_name,
    "file claims": mutations.file_claims,
    "box claims": mutations.box_claims,
    "box cover": mutations.box_cover,
    "kinds and shapes": mutations.kinds_and_shapes,
    "raw text": mutations.raw_text,
    "file cut short": of_a_file(mutations.cut_short),
    "file flipped": of_a_file(mutations.flipped),
    "file grown": of_a_file(mutations.grown),
    "file exchanged": of_a_file(mutations.exchanged),
    "header": of_a_file(mutations.header),
    "header, signed": of_a_file(mutations.header, signed=True),
    "file cut short, signed": of_a_file(mutations.cut_short, signed=True),
}
HUGGING_FACE: dict[str, tuple[str, Mutation]] = {
    "file cut short": ("one", of_a_file(mutations.cut_short)),
    "file exchanged": ("shards", of_a_file(mutations.exchanged)),
    "header": ("one", of_a_file(mutations.header)),
    "shard names": ("shards", shard_name),
    "index": ("shards", of_json("model.safetensors.index.json")),
    "config": ("one", of_json("config.json")),
    "config exchanged": ("one", of("config.json", mutations.exchanged)),
}

assert EACH * (len(CHECKPOINT) + len(HUGGING_FACE)) >= 500


@pytest.mark.parametrize("kind", CHECKPOINT)
def test_a_damaged_checkpoint_is_a_clear_error(
    originals: dict[str, Original], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(originals["step-00000002"], CHECKPOINT[kind], kind, tmp_path, monkeypatch)


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_a_damaged_model_directory_is_a_clear_error(
    originals: dict[str, Original], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, mutation = HUGGING_FACE[kind]
    check(originals[name], mutation, kind, tmp_path, monkeypatch)


def test_a_name_that_is_there_twice_is_refused(originals: dict[str, Original], tmp_path: Path) -> None:
    shutil.copytree(originals["step-00000002"].path, tmp_path / "copy")
    path = tmp_path / "copy" / "manifest.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 9,\n "step": 2'))
    with pytest.raises(CheckpointError, match="damaged: not JSON, or a name is there twice"):
        Checkpoint.open(path.parent)
