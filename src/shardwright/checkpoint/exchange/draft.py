"""A directory that appears when it is whole: written beside its place, and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardwright.checkpoint.folder import sync_directory
from shardwright.errors import CheckpointError


@contextmanager
def drafted(out: Path) -> Iterator[Path]:
    """An empty directory that becomes `out` where the block ends well, and is gone where it does not.

    Raises CheckpointError where something is there already, or it cannot be written.
    """
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: is there already", "give a directory that is not there, or an empty one")
    draft = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}")
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed and had the same id
        draft.mkdir()
        yield draft
        sync_directory(draft)
        draft.rename(out)
        sync_directory(draft.parent)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        problem = f"{out}: cannot be written: {error.strerror or error}"
        raise CheckpointError(problem, "give a place that can be written and has room for the weights") from None
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
