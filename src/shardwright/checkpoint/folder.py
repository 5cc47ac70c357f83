"""The checkpoints of a run: complete ones, and drafts that become complete by one renaming.

A name that begins with a dot is never read as a checkpoint. A draft has the tensor files and, for each rank, a part of
the manifest; whoever commits it joins these, writes the manifest last, and renames. The disk is told after each of
these, so that what has a name is whole, whatever is killed when.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardwright.checkpoint.manifest import Manifest, Part, write_manifest
from shardwright.spec.origin import COMPANIONS, steps_in

_DRAFT, _OLD, _ASIDE = ".saving-", ".old-", ".damaged-"


@dataclass(frozen=True)
class CheckpointFolder:
    """The folder of a run's checkpoints; it need not exist before something is saved."""

    path: Path

    def of_step(self, step: int) -> Path:
        """A complete checkpoint's directory."""
        return self.path / f"step-{step:08d}"

    def draft(self, step: int) -> Path:
        """Where one is being written."""
        return self.path / f"{_DRAFT}{step:08d}"

    def complete(self) -> list[Path]:
        """The complete checkpoints, in the order of their steps."""
        return steps_in(self.path)

    def written(self) -> list[Path]:
        """Every directory of a step, complete or not, in the order of their steps. Raises OSError."""
        found = [path for path in self.path.glob("step-*") if path.name[5:].isdecimal()] if self.path.is_dir() else []
        return sorted(found, key=lambda path: int(path.name[5:]))

    def pass_over(self, after: int) -> None:
        """Give what lies after a step, where a run goes on that found it damaged, a name that is never read: it must
        not come back into another run than its own. Nothing is deleted. Raises OSError."""
        for path in self.written():
            if int(path.name[5:]) > after:
                number = 1
                while (aside := path.with_name(f"{path.name}{_ASIDE}{number}")).exists():
                    number += 1
                path.rename(aside)

    def clear(self) -> None:
        """Remove what killed runs left half written or half deleted."""
        for left in self._leftovers():
            shutil.rmtree(left, ignore_errors=True)

    def _leftovers(self) -> Iterator[Path]:
        if self.path.is_dir():
            yield from (path for path in self.path.iterdir() if path.name.startswith((_DRAFT, _OLD)))

    def begin(self, step: int) -> Path:
        """The draft's directory, made by the first rank that asks. Raises OSError, where the folder is gone too: half
        a run must not appear in place of one that was removed."""
        draft = self.draft(step)
        draft.mkdir(exist_ok=True)
        return draft

    def commit(self, step: int, manifest: Manifest, companions: Path) -> None:
        """Make the draft of a step complete; `companions` are the small files that go with it. Raises OSError."""
        draft, target = self.draft(step), self.of_step(step)
        if manifest.companions:
            _copy(companions, draft / COMPANIONS, [companion.name for companion in manifest.companions])
        for part in draft.glob("*.json"):
            part.unlink()
        write_manifest(draft, manifest)
        sync_directory(draft)
        if target.exists():  # damaged, or of a run that went back behind it: it stays until this moment
            target.rename(self._old(step))
        draft.rename(target)
        sync_directory(self.path)
        shutil.rmtree(self._old(step), ignore_errors=True)

    def _old(self, step: int) -> Path:
        old = self.path / f"{_OLD}{step:08d}"
        shutil.rmtree(old, ignore_errors=True)
        return old

    def discard(self, step: int) -> None:
        """Give up the draft of a step, and its bytes on the disk."""
        shutil.rmtree(self.draft(step), ignore_errors=True)

    def prune(self, keep: int, step: int) -> None:
        """Delete all but the newest up to a step. Later ones count for nothing: a run that saves this one has passed
        them over as damaged, and writes them anew when it gets there. Raises OSError."""
        for path in [path for path in self.complete() if path.name <= self.of_step(step).name][:-keep]:
            old = self._old(int(path.name[5:]))
            path.rename(old)  # so that none is ever seen half deleted
            shutil.rmtree(old)


def _copy(source: Path, target: Path, names: list[str]) -> None:
    """Copy small files so that they are on the disk. Raises OSError."""
    shutil.rmtree(target, ignore_errors=True)  # of a save of this step that was killed
    target.mkdir()
    for name in names:
        shutil.copyfile(source / name, target / name)
        with (target / name).open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(target)


def write_part(draft: Path, part: Part, rank: int) -> None:
    """Leave a rank's part of the manifest for whoever commits. Raises OSError."""
    beside = draft / f".{rank}.part"
    with beside.open("w", encoding="utf-8") as file:
        file.write(part.model_dump_json())
        file.flush()
        os.fsync(file.fileno())
    beside.rename(_part(draft, rank))


def read_part(draft: Path, rank: int) -> Part | None:
    """A rank's part, or None while it is not to be seen here. Raises OSError."""
    try:
        return Part.model_validate_json(_part(draft, rank).read_bytes())
    except FileNotFoundError:
        return None


def _part(draft: Path, rank: int) -> Path:
    return draft / f"rank-{rank:05d}.json"


def sync_directory(path: Path) -> None:
    """Let a directory's entries reach the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
