"""Documents read from a corpus's files: whole where they are short, else in pieces that bound the memory."""

from __future__ import annotations

import codecs
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardwright.data.corpus import Source
from shardwright.errors import DataError

PIECE_BYTES = 1 << 20
"""A longer document is read and encoded in pieces of at most this many bytes. Part of the format: it moves tokens."""


@dataclass(frozen=True)
class Piece:
    """A document, or a stretch of one.

    `document` and `after` are positions in the file (bytes; rows for parquet): where the document begins, and where
    reading goes on. With a `prompt`, the loss is on `text` alone. A piece with a reason in `skipped` has no text.
    """

    text: str
    document: int
    after: int
    prompt: str = ""
    first: bool = True
    last: bool = True
    skipped: str = ""
    bytes_after: int = -1

    @property
    def done(self) -> int:
        """Bytes of the file read so far; for parquet, whose positions are rows, about so."""
        return self.after if self.bytes_after < 0 else self.bytes_after


Wanted = Callable[[int], bool]
"""Whether the document (for text: the piece) at a position is read at all."""


def read(source: Source, position: int = 0, wanted: Wanted = lambda position: True) -> Iterator[Piece]:
    """The pieces of a source from a position on, which is 0 or the `after` of an earlier piece. Raises DataError."""
    readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
    return readers[source.kind](source, position, wanted)


def cut(data: bytes, limit: int = PIECE_BYTES) -> int:
    """Length of the first piece of UTF-8 data: at most `limit`, else to the last good place to cut before it.

    Best is a line end between two characters that are not space, where byte-level BPE gives the same tokens whether
    cut or not; then any line end; then any end of a character. Only the last 64 KiB are searched.
    """
    if len(data) <= limit:
        return len(data)
    low, end = max(limit - (1 << 16), 1), limit
    while (end := data.rfind(b"\n", low, end)) >= 0:
        if not data[end - 1 : end].isspace() and not data[end + 1 : end + 2].isspace():
            return end + 1
    end = data.rfind(b"\n", low, limit) + 1
    while end == 0 and limit > 1 and data[limit] & 0xC0 == 0x80:  # inside a character
        limit -= 1
    return end or limit


def _read_text(source: Source, position: int, wanted: Wanted) -> Iterator[Piece]:
    try:
        with source.path.open("rb") as file:
            # A file of several pieces is checked as a whole first: none of it may be taken if it is skipped.
            if position == 0 and source.size > PIECE_BYTES and not _is_utf8(source.path):
                yield Piece("", 0, source.size, skipped="not UTF-8")
                return
            yield from _text_pieces(source, file, position, wanted)
    except OSError:
        yield Piece("", 0, source.size, skipped="unreadable")


def _text_pieces(source: Source, file: Any, position: int, wanted: Wanted) -> Iterator[Piece]:
    file.seek(position)
    rest = file.read(PIECE_BYTES + 1)
    while rest or position == 0:
        data = rest[: cut(rest)]
        first, last = position == 0, len(data) == len(rest)
        start, position = position, position + len(data)
        if wanted(start):
            try:
                text = data.decode("utf-8-sig" if first else "utf-8")
                reason = "" if text.strip() or not (first and last) else "empty"
                yield Piece("" if reason else text, 0, position, first=first, last=last, skipped=reason)
            except UnicodeDecodeError:
                yield Piece("", 0, source.size, skipped="not UTF-8")
                return
        if last:
            return
        rest = rest[len(data) :]
        rest += file.read(PIECE_BYTES + 1 - len(rest))


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while data := file.read(PIECE_BYTES):
                decoder.decode(data)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _read_jsonl(source: Source, position: int, wanted: Wanted) -> Iterator[Piece]:
    try:
        file = source.path.open("rb")
    except OSError as error:
        raise DataError(f"data.corpus: {source.path} cannot be read ({error.strerror})") from error
    with file:
        file.seek(position)
        for line in file:
            start, position = position, position + len(line)
            if line.isspace() or not wanted(start):
                continue
            try:
                yield _document(json.loads(line.decode("utf-8-sig")), start, position)
            except (ValueError, TypeError) as error:
                raise _bad_line(source, start, error) from error


def _bad_line(source: Source, start: int, error: Exception) -> DataError:
    number = 1
    with source.path.open("rb") as file:
        for line in file:
            if start <= 0:
                break
            start -= len(line)
            number += 1
    reason = f"not JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(
        f"data.corpus: {source.path}, line {number}: {reason}",
        'each line is {"text": ...} or {"prompt": ..., "completion": ...}',
    )


def _document(record: object, start: int, after: int) -> Piece:
    """Raises ValueError or TypeError with the reason."""
    if not isinstance(record, dict):
        raise TypeError(f"{type(record).__name__} instead of an object")
    names = ("text",) if "text" in record else ("prompt", "completion")
    if missing := [name for name in names if name not in record]:
        wanted = " and ".join(f'"{name}"' for name in missing)
        raise ValueError(f'neither "text" nor both of "prompt" and "completion" (no {wanted})')
    if names == ("text",) and ("prompt" in record or "completion" in record):
        raise ValueError('both "text" and "prompt" or "completion"')
    for name in names:
        if not isinstance(record[name], str):
            raise TypeError(f'"{name}" is {type(record[name]).__name__} instead of a string')
        if not _encodable(record[name]):
            raise ValueError(f'"{name}" holds half of a surrogate pair, which is not a character')
    text = record[names[-1]]
    prompt = record["prompt"] if len(names) == 2 else ""
    return Piece(text, start, after, prompt=prompt, skipped="" if text else "empty")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(source: Source, position: int, wanted: Wanted) -> Iterator[Piece]:
    parquet = _pyarrow_parquet()
    try:
        file = parquet.ParquetFile(source.path)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError(f"data.corpus: {source.path} is not a parquet file ({error})") from error
    have = set(file.schema_arrow.names)
    columns = ["text"] if "text" in have else ["prompt", "completion"]
    if not have.issuperset(columns):
        raise DataError(
            f"data.corpus: {source.path} has the columns {', '.join(sorted(have))}",
            "it needs a column text, or the columns prompt and completion",
        )
    row = 0
    for group in range(file.num_row_groups):
        length = file.metadata.row_group(group).num_rows
        if row + length <= position:
            row += length
            continue
        for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
            for record in batch.to_pylist():
                row += 1
                if row > position and wanted(row - 1):
                    piece = _row(source, record, row)
                    yield replace(piece, bytes_after=source.size * row // file.metadata.num_rows)


def _row(source: Source, record: dict[str, object], row: int) -> Piece:
    if None in record.values():
        return Piece("", row - 1, row, skipped="null")
    try:
        return _document(record, row - 1, row)
    except (ValueError, TypeError) as error:
        raise DataError(f"data.corpus: {source.path}, row {row}: {error}", "make the column one of strings") from error


def _pyarrow_parquet() -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        way_out = "pip install 'shardwright[parquet]'"
        raise DataError("data.corpus: reading .parquet needs pyarrow, which is not installed", way_out) from error
