"""A folder of checkpoints at every moment of a save: whatever is ended when, what has a name is whole."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwright.checkpoint.files import Entry, TensorFileWriter
from shardwright.checkpoint.folder import CheckpointFolder, read_part, write_part
from shardwright.checkpoint.load import Checkpoint
from shardwright.checkpoint.manifest import Manifest, Part, StoredBox, StoredFile, companions_in
from shardwright.errors import CheckpointError
from shardwright.layout.box import Box, GlobalTensor
from shardwright.spec.architecture import resolve_architecture
from shardwright.spec.model import ModelSpec

ARCHITECTURE = resolve_architecture(
    ModelSpec(layers=1, hidden=4, heads=2, ffn=4, vocab=5), sequence_length=4, tokenizer_vocab=None
)
RANKS, LENGTH = 2, 3
WHOLE = GlobalTensor("x", (RANKS * LENGTH,))


class Ended(BaseException):
    """In the place of SIGKILL: nothing of the save runs after it."""


_left: int | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Let the process end before the operation on files that is next when none is left."""
    global _left
    if _left is not None and (event == "open" or event.startswith(("os.", "shutil."))):
        _left -= 1
        if _left < 0:
            raise Ended


sys.addaudithook(_audit)


@contextmanager
def ended_after(operations: int) -> Iterator[None]:
    global _left
    _left = operations
    try:
        yield
    finally:
        _left = None


def save(folder: CheckpointFolder, step: int, companions: Path, keep: int) -> None:
    """What the ranks and then rank 0 do."""
    draft = folder.begin(step)
    for rank in range(RANKS):
        box = StoredBox(kind="weights", name="x", offset=(rank * LENGTH,), size=(LENGTH,))
        path = draft / f"rank-{rank:05d}.safetensors"
        path.unlink(missing_ok=True)
        writer = TensorFileWriter(path, [Entry(box.key, torch.float32, (LENGTH,))])
        writer.write(torch.full((LENGTH,), float(step)))
        writer.close()
        file = StoredFile(name=path.name, bytes=writer.num_bytes, sha256=writer.sha256, boxes=(box,))
        write_part(draft, Part(file=file, tensors={"x": WHOLE.shape}), rank)
    parts = [part for rank in range(RANKS) if (part := read_part(draft, rank)) is not None]
    files = tuple(part.file for part in parts)
    manifest = Manifest(
        architecture=ARCHITECTURE,
        dtype="fp32",
        kinds={"weights": "F32"},
        tensors={"x": WHOLE.shape},
        files=files,
        companions=companions_in(companions),
    )
    folder.commit(step, manifest, companions)
    folder.prune(keep, step)


def good(folder: CheckpointFolder) -> list[int]:
    """The steps of the whole checkpoints, each of which must hold what its name says."""
    steps = []
    for path in folder.complete():
        checkpoint, out = Checkpoint.open(path), torch.empty(WHOLE.shape)
        try:
            checkpoint.check()
        except CheckpointError:
            continue
        checkpoint.weights.read(Box.whole(WHOLE), out)
        assert out.tolist() == [float(path.name.removeprefix("step-"))] * len(out)
        assert (checkpoint.companions / "tokenizer.json").read_text() == "mine"
        steps.append(int(path.name.removeprefix("step-")))
    return steps


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("mine")
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.path.mkdir()
    for step in (1, 2):
        save(folder, step, tmp_path / "model", keep=2)
    return folder


def damage(path: Path) -> None:
    os.truncate(path / "rank-00001.safetensors", 40)


def every_moment(folder: CheckpointFolder, step: int, check: Callable[[list[int]], None]) -> int:
    """End the save of a step before each of its operations on files, and see what is left; their number."""
    before, companions = folder.path.with_name("before"), folder.path.with_name("model")
    shutil.copytree(folder.path, before)
    for operations in range(1000):
        shutil.rmtree(folder.path)
        shutil.copytree(before, folder.path)
        try:
            with ended_after(operations):
                save(folder, step, companions, keep=2)
        except Ended:
            check(good(folder))
            folder.clear()  # as the next start does
            assert all(path.name.startswith("step-") for path in folder.path.iterdir())
            check(good(folder))
            save(folder, step, companions, keep=2)
            assert good(folder)[-1] == step
        else:
            return operations
    raise AssertionError("no save takes so long")


def test_a_save_that_is_ended_at_any_moment_leaves_what_is_whole(folder: CheckpointFolder) -> None:
    def check(steps: list[int]) -> None:
        assert steps in ([1, 2], [1, 2, 3], [2, 3])

    assert every_moment(folder, 3, check) > 30
    assert good(folder) == [2, 3]


def test_one_in_the_place_of_a_damaged_one_leaves_what_was_before_it(folder: CheckpointFolder) -> None:
    damage(folder.of_step(2))

    def check(steps: list[int]) -> None:
        assert steps in ([1], [1, 2])

    every_moment(folder, 2, check)
    assert good(folder) == [1, 2]


def test_a_damaged_one_that_was_passed_over_does_not_count_as_the_newest(folder: CheckpointFolder) -> None:
    save(folder, 9, folder.path.with_name("model"), keep=3)
    damage(folder.of_step(9))
    save(folder, 3, folder.path.with_name("model"), keep=1)
    assert good(folder) == [3]
