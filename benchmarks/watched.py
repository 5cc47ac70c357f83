"""Small runs of `shardwright train`, watched from outside, and whether they ended as one that was left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwright.checkpoint.load import Checkpoint
from shardwright.errors import ShardwrightError
from shardwright.layout.box import Box
from shardwright.record.store import read_lines
from shardwright.train.directory import RunDirectory

STEPS, EVERY = 30, 3
WORLD_SIZE = 4
RECIPE = f"""
[model]
layers = 2
hidden = 16
heads = 2
ffn = 24

[data]
corpus = "text"
validation_fraction = 0.2
eval_every = 10
eval_batches = 1

[train]
steps = {STEPS}
sequence_length = 8
global_batch_size = 8
micro_batch_size = 2
warmup_steps = 1
dtype = "fp32"

[parallel]
dp = 2
pp = 2

[checkpoint]
every = {EVERY}

[run]
device = "cpu"
"""
_LIMIT = 600.0  # seconds for a run
_TIMES = ("seconds", "tokens_per_second", "mfu")  # what differs from run to run


class Run:
    """A run of the recipe in `folder`, under a launcher of its own. `text` is what it says."""

    def __init__(self, folder: Path, name: str, *options: str) -> None:
        self.directory = RunDirectory(folder / name)
        self._log = (folder / f"{name}.log").open("a+")
        self._log.seek(0, os.SEEK_END)
        self._begin = self._log.tell()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shardwright", "train", "r.toml", *options, "--run-dir", name],
            stdout=self._log,
            stderr=self._log,
            cwd=folder,
            env=os.environ | {"SHARDWRIGHT_CACHE": str(folder / "cache")},
            start_new_session=True,
        )

    @property
    def text(self) -> str:
        """All that it has said so far."""
        self._log.seek(self._begin)
        return self._log.read()

    def end(self) -> int:
        """Wait for its end; the exit code."""
        return self.process.wait(_LIMIT)

    def has_ended(self) -> bool:
        """Whether the launcher has left."""
        return self.process.poll() is not None

    def ranks(self, attempt: int = 0) -> dict[int, int]:
        """Process ids of the ranks that were started at an attempt, by rank."""
        found = {}
        for process in _children(self.process.pid):
            places, is_rank = _environment_of(process), b"shardwright.comm.rank" in _command(process)
            if is_rank and places.get("TORCHELASTIC_RESTART_COUNT") == str(attempt):
                found[int(places["RANK"])] = process
        return found

    def step(self) -> int:
        """The last step that it has recorded."""
        path = self.directory.steps
        return max((row["step"] for row in read_lines(path)), default=0) if path.exists() else 0

    def drafts(self) -> list[Path]:
        """Checkpoints that are half written or half deleted."""
        folder = self.directory.checkpoints
        return sorted(path for path in folder.iterdir() if path.name.startswith(".")) if folder.is_dir() else []

    def close(self) -> None:
        """End what still runs of it."""
        if not self.has_ended():
            self.process.kill()  # the ranks follow
            self.process.wait()
        self._log.close()


def prepare(folder: Path) -> None:
    """Put the recipe and its text into a folder."""
    (folder / "r.toml").write_text(RECIPE)
    (folder / "text").mkdir()
    for i in range(8):
        (folder / "text" / f"{i}.txt").write_text(f"document {i}: " + "a line of text to learn from\n" * 40)


# What is left, and whether it is as it should be


def _children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:  # it has ended
        return []


def _command(process: int | str) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def _environment_of(process: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)


def processes_of(launcher: int) -> list[int]:
    """Ranks that a launcher has started, whoever their parent is now."""
    own = f"-{launcher}-".encode()
    numbers = [path.name for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [int(n) for n in numbers if b"shardwright.comm.rank" in (text := _command(n)) and own in text]


def left_by(run: Run) -> list[str]:
    """What a run has left that it should not have: processes, its temporary folder, half a checkpoint."""
    launcher, deadline = run.process.pid, time.monotonic() + 5
    while (processes := processes_of(launcher)) and time.monotonic() < deadline:
        time.sleep(0.05)
    folders = sorted(Path(tempfile.gettempdir()).glob(f"shardwright-*-{launcher}-*"))
    return [
        *(f"process {p} is left" for p in processes),
        *(f"{path.name} is left" for path in (*folders, *run.drafts())),
    ]


def tensors_of(checkpoint: Checkpoint) -> dict[tuple[str, str], Tensor]:
    """Every whole tensor of a checkpoint, by kind and name."""
    found = {}
    for (kind, name), stored in checkpoint.stored.items():
        box = Box.whole(stored[0].box.tensor)
        found[kind, name] = torch.empty(box.size)
        checkpoint.kind(kind).read(box, found[kind, name])
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = read_lines(path)
    return [{name: value for name, value in row.items() if name not in _TIMES} for row in rows]


def differences(directory: RunDirectory, straight: RunDirectory) -> Iterator[str]:
    """In what a run's end differs from that of one that was left alone."""
    for path, other in ((directory.steps, straight.steps), (directory.validation, straight.validation)):
        if _rows(path) != _rows(other):
            yield f"{path.name} differs"
    saved = [row["step"] for row in read_lines(directory.saves)]
    if saved != sorted(set(saved)):
        yield f"{directory.saves.name} has {saved}"
    for path in directory.checkpoints.iterdir():
        try:
            Checkpoint.open(path).check()
        except ShardwrightError as error:
            yield error.problem
            return
    for name in sorted(path.name for path in straight.checkpoints.iterdir()):
        one, other = Checkpoint.open(directory.checkpoints / name), Checkpoint.open(straight.checkpoints / name)
        if one.manifest.training != other.manifest.training:
            yield f"{name}: {one.manifest.training} is not {other.manifest.training}"
        if _small(one.companions) != _small(other.companions):
            yield f"{name}: other companions"
        there, expected = tensors_of(one), tensors_of(other)
        if there.keys() != expected.keys():
            yield f"{name}: other tensors"
        yield from (f"{name}: {key} differs" for key in expected if not torch.equal(there[key], expected[key]))


def _small(companions: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in companions.iterdir()}
