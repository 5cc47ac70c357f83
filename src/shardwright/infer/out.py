"""Where `--out` writes: a file that is either complete or not there, or a device or pipe that takes the lines."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from shardwright.errors import RunError
from shardwright.record.store import write_text

_WAY_OUT = "give another place, or leave it out: the texts are then printed"


def check_out(out: str) -> None:
    """Raises RunError where nothing could be written, as far as that shows without writing."""
    if not out:
        raise RunError("--out: an empty name", _WAY_OUT)
    try:
        if _is_stream(out):
            writable = os.access(out, os.W_OK)
        else:
            parent = _target(out).parent
            if not parent.is_dir():
                raise RunError(f"--out: {out}: there is no directory {parent}", "make it, or give another place")
            writable = os.access(parent, os.W_OK | os.X_OK)
        if os.path.isdir(out) or out.endswith("/"):
            raise RunError(f"--out: {out}: is a directory", "give the name of a file")
    except OSError as error:
        raise _unwritable(out, error.strerror) from None
    if not writable:
        raise _unwritable(out, "no permission")


def write_out(out: str, text: str) -> None:
    """Write the text. Raises RunError."""
    try:
        if _is_stream(out):
            Path(out).write_text(text, encoding="utf-8")
        else:
            write_text(_target(out), text)
    except OSError as error:
        raise _unwritable(out, error.strerror) from None


def _unwritable(out: str, reason: str | None) -> RunError:
    return RunError(f"--out: {out}: cannot be written: {reason}", _WAY_OUT)


def _is_stream(out: str) -> bool:
    """Whether something is there that must not be replaced, such as a device or a pipe. Raises OSError."""
    try:
        mode = os.stat(out).st_mode
    except FileNotFoundError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _target(out: str) -> Path:
    """The file itself, where links lead to it: they stay."""
    return Path(os.path.realpath(out))
