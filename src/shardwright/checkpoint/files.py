"""Tensor files: safetensors, written as a stream and read through memory maps.

The library's own writer takes all tensors at once and copies them; a rank writes its kept buffers tensor after tensor
and computes their checksum on the way. Reading is the library's, which checks what a header claims.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shardwright.errors import CheckpointError
from shardwright.units import format_bytes

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_MOST_TOLD = 300  # characters of what a file says that an error repeats
_BLOCK = 4 << 20  # bytes hashed and written at a time


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its key, dtype and shape."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFileWriter:
    """Writes the tensors of `entries`, in their order, into a new safetensors file. Raises OSError.

    After `close` the file is on the disk, of `num_bytes` bytes with the checksum `sha256`.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: dict[str, str] | None = None) -> None:
        self._left = list(entries)
        self._hash = hashlib.sha256()
        self.num_bytes = 0
        self._file = path.open("xb", buffering=0)
        self._put(_header(entries, metadata))

    def write(self, tensor: Tensor) -> None:
        """The next entry's elements, from any device and in any dtype."""
        entry = self._left.pop(0)
        assert tensor.shape == entry.shape, f"{entry.key}: {tuple(tensor.shape)} is not {entry.shape}"
        flat = tensor.detach().to(device="cpu", dtype=entry.dtype).contiguous().view(-1)
        self.write_bytes(flat.view(torch.uint8))

    def write_bytes(self, content: Tensor) -> None:
        """Bytes of the tensors that follow, flat, in host memory."""
        self._put(content.numpy().data)

    def _put(self, content: memoryview | bytes) -> None:
        for begin in range(0, len(content), _BLOCK):
            block = memoryview(content)[begin : begin + _BLOCK]
            self._hash.update(block)
            self.num_bytes += len(block)
            while block:
                block = block[self._file.write(block) :]

    def close(self) -> None:
        """Let the file reach the disk."""
        os.fsync(self._file.fileno())
        self._file.close()

    @property
    def sha256(self) -> str:
        """The checksum of all that was written."""
        return self._hash.hexdigest()


def _header(entries: Sequence[Entry], metadata: dict[str, str] | None) -> bytes:
    content: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for entry in entries:
        end = begin + entry.num_bytes
        content[entry.key] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": (begin, end)}
        begin = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that what follows is aligned
    return struct.pack("<Q", len(text)) + text


class TensorFile:
    """An open safetensors file. Raises CheckpointError where it is not one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        require_file(path)
        try:
            self._file = safe_open(path, framework="pt")  # no context: the map lives as long as what is read from it
            self.keys = frozenset(self._file.keys())
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: not a whole safetensors file: {one_line(error)}", "take another copy of it"
            ) from None

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the tensor `key`."""
        return tuple(self._file.get_slice(key).get_shape())

    def dtype(self, key: str) -> str:
        """Of the tensor `key`, by the format's name for it, such as "F32"."""
        return self._file.get_slice(key).get_dtype()

    def tensor(self, key: str) -> Tensor:
        """The tensor `key`, memory-mapped: what is not touched is not read."""
        return self._file.get_tensor(key)


def one_line(told: object) -> str:
    """What is told, in one line that can be read: what is damaged or hostile may name anything."""
    text = str(told)
    printable = "".join(c if c.isprintable() else "?" for c in text[:_MOST_TOLD])
    return printable + "..." * (len(text) > _MOST_TOLD)


def require_file(path: Path, num_bytes: int | None = None) -> None:
    """Raises CheckpointError where the path is no file of its own, such as a link, or has another size."""
    try:
        status = path.lstat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", "take another copy of it") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file", "checkpoints hold no links: take another copy of it")
    if num_bytes is not None and status.st_size != num_bytes:
        raise CheckpointError(
            f"{path}: {format_bytes(status.st_size)} ({status.st_size} bytes), and {num_bytes} were written",
            "take another copy of it",
        )


def sha256_of(path: Path, progress: Callable[[int], None] = lambda _: None) -> str:
    """The checksum of a file's bytes; `progress` is told of each block's. Raises CheckpointError."""
    digest, buffer = hashlib.sha256(), bytearray(_BLOCK)
    try:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                digest.update(memoryview(buffer)[:size])
                progress(size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", "take another copy of it") from None
    return digest.hexdigest()
