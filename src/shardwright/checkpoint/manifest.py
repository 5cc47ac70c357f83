"""The manifest of a checkpoint: which file holds which box of which named tensor, and where training stands.

It is JSON, and closed by a checksum of its own text, so that a damaged one is not taken for another. What it claims is
checked before anything is done with it: file names are plain, boxes lie inside their tensors and hold every element of
these once, and files are large enough for what is said to be in them.

Note: boxes that cover a tensor. The corners of a box, each with a sign, say all about it: an element lies in it if the
signs of the corners at or before it add up to one. So boxes hold every element of a tensor once if and only if their
corners add up, sign by sign, to those of the whole. That is exact, and takes as long as there are boxes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from shardwright.checkpoint.files import DTYPE_NAMES, one_line, require_file, sha256_of
from shardwright.errors import CheckpointError, ShardwrightError
from shardwright.layout.box import Box, GlobalTensor
from shardwright.spec.architecture import Architecture
from shardwright.spec.origin import MANIFEST, MOST_BYTES
from shardwright.spec.section import Count, Positive, Section
from shardwright.spec.train import Dtype

WEIGHTS = "weights"
"""The kind of tensor that every checkpoint has: the most exact values of the parameters."""

Shape = Annotated[
    tuple[Positive, ...],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    Field(max_length=8),
]
StoredDtype = Literal["F64", "F32", "F16", "BF16"]

_Corners = defaultdict[tuple[int, ...], int]
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.safetensors")
_COMPANION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_WAY_OUT = "use another checkpoint, or another copy of this one"


class StoredBox(Section):
    """A box of a tensor, of one kind: its weights, or one moment of the optimizer's."""

    kind: str
    name: str
    offset: tuple[Count, ...]
    size: tuple[Positive, ...]

    @property
    def key(self) -> str:
        """Its name in its file: weights/layers.0.mlp.up.weight[0:4, 0:16]."""
        ranges = ", ".join(f"{o}:{o + s}" for o, s in zip(self.offset, self.size, strict=True))
        return f"{self.kind}/{self.name}[{ranges}]"


class StoredFile(Section):
    """A tensor file: its size and checksum, and its boxes in their order."""

    name: str
    bytes: Count
    sha256: Annotated[str, Field(pattern=_DIGEST.pattern)]
    boxes: tuple[StoredBox, ...]


class Part(Section):
    """What one rank adds to a manifest: its file, and the whole shapes of the tensors in it."""

    file: StoredFile
    tensors: dict[str, Shape]


class Companion(Section):
    """A small file that travels with the weights."""

    name: str
    bytes: Count
    sha256: Annotated[str, Field(pattern=_DIGEST.pattern)]


class Training(Section):
    """Where training stands after `step` steps.

    `position` is the next sample of the stream, `updates` how many steps were applied, `nonfinite` how many in a row
    were not, `validated` the step after which the last evaluation was, `data` the fingerprint of what was read,
    `world_size` the ranks whose random state the files have.
    """

    step: Count
    position: Count
    updates: Count
    skipped: Count = 0
    nonfinite: Count = 0
    validated: Count | None = None
    optimizer: str
    seed: Count
    data: str
    world_size: Positive


class Manifest(Section):
    """What a checkpoint holds. `kinds` says the dtype of each kind of tensor, `dtype` what the model computes in;
    `plan` is the layout it was written on, for people and reports: nothing is decided by it."""

    format: Literal["shardwright checkpoint"] = "shardwright checkpoint"
    version: Literal[1] = 1
    architecture: Architecture
    dtype: Dtype
    kinds: dict[str, StoredDtype]
    tensors: dict[str, Shape]
    files: tuple[StoredFile, ...]
    companions: tuple[Companion, ...] = ()
    training: Training | None = None
    plan: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Manifest:
        if WEIGHTS not in self.kinds:
            raise ValueError(f"it has no {WEIGHTS}")
        corners: defaultdict[tuple[str, str], _Corners] = defaultdict(lambda: defaultdict(int))
        for file in self.files:
            if not _FILE.fullmatch(file.name):
                raise ValueError(f"{file.name!r} is not the name of a tensor file")
            num_bytes = 0
            for box in file.boxes:
                _check_box(box, self)
                _add_corners(corners[box.kind, box.name], box.offset, box.size, 1)
                num_bytes += math.prod(box.size) * _ITEM_SIZE[self.kinds[box.kind]]
            if num_bytes > file.bytes:
                raise ValueError(f"{file.name} is to hold {num_bytes} bytes of tensors, and has {file.bytes}")
        for companion in self.companions:
            if not _COMPANION.fullmatch(companion.name):
                raise ValueError(f"{companion.name!r} is not the name of a file that travels with weights")
        if len({file.name for file in self.files}) != len(self.files):
            raise ValueError("a file is listed twice")
        for name, shape in self.tensors.items():
            for kind in self.kinds:
                _add_corners(corners[kind, name], (0,) * len(shape), shape, -1)
                if any(corners[kind, name].values()):
                    raise ValueError(f"{kind}/{name}: its boxes do not hold each of its elements once")
        return self

    def boxes(self) -> Iterator[tuple[StoredFile, StoredBox, Box]]:
        """Every box, with the file that holds it."""
        tensors = {name: GlobalTensor(name, shape) for name, shape in self.tensors.items()}
        for file in self.files:
            for box in file.boxes:
                yield file, box, Box(tensors[box.name], box.offset, box.size)

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(shape) for shape in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)


def _add_corners(corners: _Corners, offset: tuple[int, ...], size: tuple[int, ...], sign: int) -> None:
    """Add a box's corners, each with its sign: see the note."""
    signed: list[tuple[tuple[int, ...], int]] = [((), sign)]
    for o, s in zip(offset, size, strict=True):
        signed = [*(((*at, o), sign) for at, sign in signed), *(((*at, o + s), -sign) for at, sign in signed)]
    for at, sign in signed:
        corners[at] += sign


def _check_box(box: StoredBox, manifest: Manifest) -> None:
    shape = manifest.tensors.get(box.name)
    if shape is None or box.kind not in manifest.kinds:
        raise ValueError(f"{box.kind}/{box.name} is stored, but not listed")
    inside = len(shape) == len(box.offset) == len(box.size) and all(
        o + s <= whole for o, s, whole in zip(box.offset, box.size, shape, strict=True)
    )
    if not inside:
        raise ValueError(f"{box.kind}/{box.name}: a box of {box.size} at {box.offset} is not inside {shape}")


def companions_in(directory: Path) -> tuple[Companion, ...]:
    """What a manifest says of the small files in a directory, which need not be there. Raises CheckpointError."""
    paths = sorted(directory.iterdir()) if directory.is_dir() else []
    return tuple(Companion(name=p.name, bytes=p.stat().st_size, sha256=sha256_of(p)) for p in paths if p.is_file())


def stored_dtype(dtype: torch.dtype) -> StoredDtype:
    """A manifest's name of a floating dtype."""
    return cast(StoredDtype, DTYPE_NAMES[dtype])


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write a directory's manifest so that it is on the disk, complete. Raises OSError."""
    content = manifest.model_dump(mode="json")
    content["checksum"] = _checksum(content)
    with (directory / MANIFEST).open("x", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a directory. Raises CheckpointError where there is none, or it is damaged."""
    path = directory / MANIFEST
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint", "give the directory that holds manifest.json")
    if not path.exists():
        raise CheckpointError(f"{directory}: not a complete checkpoint: it has no {MANIFEST}", _WAY_OUT)
    require_file(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes are no manifest", _WAY_OUT)
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", _WAY_OUT) from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: damaged: not JSON, or a name is there twice", _WAY_OUT) from None
    return _checked(path, content)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of a name that is there twice, readers would take one or the other."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name is there twice")
    return content


def _checked(path: Path, content: Any) -> Manifest:
    if not isinstance(content, dict) or "checksum" not in content:
        raise CheckpointError(f"{path}: not the manifest of a checkpoint", _WAY_OUT)
    version = content.get("version")
    if version != 1:
        raise CheckpointError(f"{path}: of version {one_line(version)}, and this Shardwright reads version 1", _WAY_OUT)
    checksum = content.pop("checksum")
    try:
        if checksum != _checksum(content):
            raise CheckpointError(f"{path}: damaged: its checksum is another", _WAY_OUT)
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        told = first["msg"].removeprefix("Value error, ")
        where = one_line(".".join(map(str, first["loc"])))
        raise CheckpointError(f"{path}: {where + ': ' if where else ''}{one_line(told)}", _WAY_OUT) from None
    except CheckpointError:
        raise
    except (ShardwrightError, RecursionError, ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path}: damaged: {one_line(error)}", _WAY_OUT) from None


def _checksum(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
