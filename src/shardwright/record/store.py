"""JSON and JSON lines on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity; readers get null."""
    if isinstance(value, float) and value not in (float("inf"), float("-inf")) and value == value:
        return value
    if isinstance(value, float):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


class JsonLines:
    """A file of one JSON object a line, appended to row by row, so that a killed run keeps its rows.

    A row that cannot be written, as on a full disk, is kept and tried again with the next; the file ends with a whole
    row throughout.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._left: list[bytes] = []

    def append(self, row: dict[str, Any]) -> None:
        """Write one row. Raises OSError, once for rows that are kept one after another."""
        was_behind = bool(self._left)
        self._left.append(json.dumps(_finite(row)).encode() + b"\n")
        end = self._file.seek(0, os.SEEK_END)
        try:
            content = memoryview(b"".join(self._left))
            while content:
                content = content[self._file.write(content) :]
        except OSError:
            with suppress(OSError):
                self._file.truncate(end)
            if not was_behind:
                raise
        else:
            self._left = []

    @property
    def behind(self) -> int:
        """Rows that are not in the file."""
        return len(self._left)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file up to the first that is none: one that was cut off, or never reached the disk."""
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if not isinstance(row, dict):
                return
            yield row


def cut_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leave the rows of a JSON-lines file that are to be kept, if it is there; a last line that was cut off goes."""
    if not path.exists():
        return
    write_text(path, "".join(json.dumps(row) + "\n" for row in read_lines(path) if keep(row)))


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either complete or as it was. Raises OSError."""
    beside = path.with_name(f".shardwright-{os.getpid()}")  # as long for every name: long ones leave no room for more
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as `write_text` does."""
    write_text(path, json.dumps(_finite(content), indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
