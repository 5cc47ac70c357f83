"""A prepared directory: two splits of memory-mapped tokens, their masks, the tokenizer, and a manifest of them.

    manifest.json               what this is; written last, so a directory that has it is complete
    train.bin                   token ids, little-endian uint16 or uint32, each document followed by the separator
    train.mask.bin              one uint8 per token: 1 where the token carries loss as a target; only if some do not
    validation.bin, validation.mask.bin
    shardwright-tokenizer.json  which tokenizer; a learned one is beside it in tokenizer.json

Names in the manifest are relative, so the directory may be moved. Nothing here is ever unpickled.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardwright.data.file import sha256, write_json
from shardwright.data.tokenizer import Tokenizer, load_tokenizer
from shardwright.errors import DataError

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")

_AGAIN = "remove the directory and prepare it again: shardwright data prepare"


@dataclass
class Split:
    """Counts of one split. Loss tokens are those that carry loss as a target."""

    documents: int = 0
    tokens: int = 0
    loss_tokens: int = 0


@dataclass(frozen=True)
class PreparedData:
    """A complete prepared directory and what its manifest says.

    `tokenizer` is the spec it was prepared with and `separator` an id; `skipped` counts files and documents left out
    by reason; `files` maps a file's name to its bytes and SHA-256; `shardwright` is the version that wrote it.
    """

    directory: Path
    name: str
    fingerprint: str
    tokenizer: str
    vocab_size: int
    separator: int
    dtype: str
    validation_fraction: float
    seed: int
    splits: dict[str, Split]
    skipped: dict[str, int]
    files: dict[str, dict[str, Any]]
    shardwright: str

    def tokens(self, split: str) -> np.ndarray:
        """The token ids of "train" or "validation", `dtype` [tokens], mapped from the file and read-only."""
        return _map(self.directory / tokens_file(split), np.dtype(self.dtype))

    def mask(self, split: str) -> np.ndarray | None:
        """uint8 [tokens], 1 where a token carries loss as a target; None where all do."""
        name = mask_file(split)
        return _map(self.directory / name, np.dtype(np.uint8)) if name in self.files else None

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that the tokens were made with. Raises DataError."""
        return load_tokenizer(self.directory)

    def write(self) -> None:
        """Write the manifest, at once and last."""
        content = {"format": FORMAT, **asdict(self)}
        del content["directory"]
        write_json(self.directory / MANIFEST, content)

    def check(self) -> None:
        """Raises DataError where a file's content is not what was prepared. Reads every byte."""
        for name, entry in self.files.items():
            if sha256(self.directory / name) != entry["sha256"]:
                raise DataError(f"{self.directory / name}: its content is not what was prepared (SHA-256)", _AGAIN)


def tokens_file(split: str) -> str:
    """Name of the file of a split's tokens."""
    return f"{split}.bin"


def mask_file(split: str) -> str:
    """Name of the file of a split's mask."""
    return f"{split}.mask.bin"


def is_prepared(directory: Path) -> bool:
    """Whether the directory says of itself that it is prepared and complete."""
    return (directory / MANIFEST).is_file()


def open_prepared(directory: Path) -> PreparedData:
    """Read a manifest and check it against the sizes of the files. Raises DataError; `check` goes deeper."""
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", _AGAIN) from error
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error})", _AGAIN) from error
    version = content.pop("format", None) if isinstance(content, dict) else None
    if version != FORMAT:
        raise DataError(f"{path}: its format is {version!r}, and this version of shardwright reads {FORMAT}", _AGAIN)
    try:
        content["splits"] = {split: Split(**content["splits"][split]) for split in SPLITS}
        prepared = PreparedData(directory=directory, **content)
        np.dtype(prepared.dtype)
        expected = {name: int(entry["bytes"]) for name, entry in prepared.files.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: is not a manifest of prepared data ({error})", _AGAIN) from error
    _check_sizes(prepared, expected)
    return prepared


def _check_sizes(prepared: PreparedData, expected: dict[str, int]) -> None:
    for split in SPLITS:
        tokens, name = prepared.splits[split].tokens, tokens_file(split)
        if expected.get(name) != tokens * np.dtype(prepared.dtype).itemsize:
            said = f"{tokens} tokens of {split} in {expected.get(name)} bytes of {prepared.dtype}"
            raise DataError(f"{prepared.directory / MANIFEST}: {said} do not agree", _AGAIN)
        if expected.get(mask_file(split), tokens) != tokens:
            said = f"{tokens} tokens of {split}, {expected[mask_file(split)]} of its mask"
            raise DataError(f"{prepared.directory / MANIFEST}: {said}", _AGAIN)
    for name, size in expected.items():
        path = prepared.directory / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            have = "is missing" if found is None else f"has {found} bytes"
            raise DataError(f"{path}: {have}, and the manifest says {size} bytes", _AGAIN)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    # mmap cannot map nothing
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
