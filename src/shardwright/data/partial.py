"""A prepared directory in the making: appended to, cut back to its journal after a crash, renamed when complete.

Note: surviving SIGKILL. Tokens are appended to the split files, then the journal is replaced, which says how long the
files are and where in the corpus to go on. Whatever lies past those lengths was written by a part that did not
finish, and is cut off. So the directory always equals the state after some whole part, and what follows depends on
nothing but that state: the end result is the same bytes whether or not anything was interrupted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from shardwright.data.file import write_json
from shardwright.data.manifest import SPLITS, Split, mask_file, tokens_file

JOURNAL = "journal.json"
LOCK = "lock"

_COPY = 1 << 22  # tokens moved at a time


@dataclass
class Journal:
    """What is done: sources before `source`, and that one up to `position`.

    `masked` are the splits with a mask file. `last_document` counts the tokens of the training split's last document.
    `balanced` says that the validation split has got what it must have.
    """

    fingerprint: str
    source: int = 0
    position: int = 0
    splits: dict[str, Split] = field(default_factory=lambda: {split: Split() for split in SPLITS})
    masked: list[str] = field(default_factory=list)
    last_document: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    balanced: bool = False


class Partial:
    """The directory that is being built for one fingerprint, in the state of its journal."""

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.directory = directory
        found = _read_journal(directory / JOURNAL, fingerprint)
        self.journal = found or Journal(fingerprint)
        if found is None:
            clear(directory)
            self.commit()

    def restore(self, dtype: np.dtype) -> None:
        """Cut the files of tokens of this dtype back to the journal, or begin anew where a file is too short for it."""
        self.dtype = dtype
        if not self._cut_back():
            self.journal = Journal(self.journal.fingerprint)
            self.commit()
            self._cut_back()

    def _cut_back(self) -> bool:
        for split in SPLITS:
            tokens = self.journal.splits[split].tokens
            sizes = {tokens_file(split): tokens * self.dtype.itemsize}
            if split in self.journal.masked:
                sizes[mask_file(split)] = tokens
            else:
                (self.directory / mask_file(split)).unlink(missing_ok=True)
            for name, size in sizes.items():
                with (self.directory / name).open("ab") as file:
                    if file.tell() < size:
                        return False
                    file.truncate(size)
        return True

    def append(self, split: str, tokens: np.ndarray, mask: np.ndarray | None) -> None:
        """Add tokens of `dtype` and their uint8 mask, where None is all ones. `commit` makes them count."""
        counts = self.journal.splits[split]
        if mask is not None and split not in self.journal.masked:
            self._append(mask_file(split), np.ones(counts.tokens, np.uint8))
            self.journal.masked.append(split)
        if split in self.journal.masked:
            self._append(mask_file(split), np.ones(len(tokens), np.uint8) if mask is None else mask)
        self._append(tokens_file(split), tokens)
        counts.tokens += len(tokens)
        counts.loss_tokens += len(tokens) if mask is None else int(mask.sum())

    def move_tail(self, count: int) -> None:
        """Move the last tokens of the training split to the end of the validation split, and commit that."""
        train = self.journal.splits["train"]
        masked = "train" in self.journal.masked
        end = train.tokens
        for start in range(end - count, end, _COPY):
            length = min(_COPY, end - start)
            tokens = self._read(tokens_file("train"), self.dtype, start, length)
            mask = self._read(mask_file("train"), np.dtype(np.uint8), start, length) if masked else None
            self.append("validation", tokens, mask)
            train.loss_tokens -= length if mask is None else int(mask.sum())
        train.tokens -= count
        self.commit()
        self._cut_back()

    def commit(self) -> None:
        """Make everything appended so far survive."""
        write_json(self.directory / JOURNAL, asdict(self.journal))

    def drop_masks(self) -> None:
        """Remove a mask that masks nothing: its loss was in tokens that have moved to the other split."""
        for split in list(self.journal.masked):
            counts = self.journal.splits[split]
            if counts.tokens == counts.loss_tokens:
                self.journal.masked.remove(split)
        self.commit()
        self._cut_back()

    def _append(self, name: str, values: np.ndarray) -> None:
        with (self.directory / name).open("ab") as file:
            file.write(np.ascontiguousarray(values).data)
            file.flush()
            os.fsync(file.fileno())

    def _read(self, name: str, dtype: np.dtype, start: int, length: int) -> np.ndarray:
        return np.fromfile(self.directory / name, dtype, length, offset=start * dtype.itemsize)


def _read_journal(path: Path, fingerprint: str) -> Journal | None:
    """None where there is no journal, or one of other data."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["splits"] = {split: Split(**content["splits"][split]) for split in SPLITS}
        journal = Journal(**content)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return journal if journal.fingerprint == fingerprint else None


def clear(directory: Path) -> None:
    """Empty a directory, but for the lock on it."""
    for path in directory.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def discard(directory: Path) -> None:
    """Remove a directory whose lock is held: the lock last, for from then on the directory may be someone else's."""
    clear(directory)
    (directory / LOCK).unlink()
    with contextlib.suppress(OSError):  # it has been taken already
        directory.rmdir()


@contextlib.contextmanager
def locked(directory: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the directory, created if missing, against other processes; `waiting` is called before a wait.

    The lock ends with its process, however that ends. The file lies inside the directory and moves with it when it is
    renamed, so whoever waited for it then finds that it is no longer where it was, and takes a new one.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory)
        try:
            descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # renamed away in between
            continue
        try:
            _lock(descriptor, waiting)
            if _same(descriptor, directory / LOCK):
                yield
                return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, waiting: Callable[[], None]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waiting()
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
