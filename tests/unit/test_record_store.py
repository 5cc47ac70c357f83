"""Rows outlive a full disk and a kill."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from shardwright.record.store import JsonLines, cut_lines, read_lines


class FullDisk:
    """A file of which only so many more bytes can be written."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self.room = file, room

    def write(self, content: memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._file.write(content[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_rows_wait_for_room_and_no_row_is_half_there(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "rows.jsonl")
    lines.append({"step": 1})
    disk = FullDisk(lines._file, 5)
    lines._file = disk  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        lines.append({"step": 2})
    disk.room = 0
    lines.append({"step": 3})  # told once
    assert lines.behind == 2
    assert (tmp_path / "rows.jsonl").read_text() == '{"step": 1}\n'
    disk.room = 1000
    lines.append({"step": 4})
    assert lines.behind == 0
    assert [row["step"] for row in read_lines(tmp_path / "rows.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("end", [b'{"step": 3', b"\0\0\0\n", b"[]\n", b"\xff\n" + b'{"step": 4}\n'])
def test_what_is_no_row_ends_the_rows(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + end)
    cut_lines(path, lambda row: row["step"] <= 9)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
