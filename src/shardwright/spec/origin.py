"""What `model.init_from` names: a checkpoint or a Hugging Face directory, and the architecture that lies in it."""

from __future__ import annotations

import json
import stat
from enum import StrEnum
from pathlib import Path
from typing import Any

from shardwright.errors import RecipeError
from shardwright.spec.hf_config import read_config
from shardwright.spec.model import ModelSpec

MANIFEST = "manifest.json"
MOST_BYTES = 4 << 30
"""A larger file is no manifest."""

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
"""Of a run directory: holds step-00000100 and the like."""

COMPANIONS = "model"
"""Of a checkpoint and of a run: the small files that travel with weights, such as a tokenizer's."""

FIELD = "model.init_from"


class Origin(StrEnum):
    """What kind of directory weights come from."""

    CHECKPOINT = "checkpoint"
    HUGGING_FACE = "Hugging Face directory"


def origin_of(text: str, field: str = FIELD) -> tuple[Origin, Path]:
    """The kind of directory, and the directory itself: of a run, its newest checkpoint. Raises RecipeError."""
    path = Path(text).expanduser()
    if (path / MANIFEST).is_file():
        return Origin.CHECKPOINT, path
    if (path / CHECKPOINTS).is_dir():
        saved = steps_in(path / CHECKPOINTS)
        if not saved:
            raise RecipeError(f"{field}: {text} is a run without a checkpoint", "give a checkpoint, or train further")
        return Origin.CHECKPOINT, saved[-1]
    if (path / CONFIG).is_file():
        return Origin.HUGGING_FACE, path
    what = "no such directory" if not path.exists() else f"has neither {MANIFEST} nor {CONFIG}"
    raise RecipeError(f"{field}: {text}: {what}", "give a checkpoint, a run directory or a Hugging Face directory")


def steps_in(checkpoints: Path) -> list[Path]:
    """The complete checkpoints of a run's folder, in the order of their steps."""
    found = [path for path in checkpoints.glob("step-*") if path.name[5:].isdecimal() and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def saved_architecture(directory: Path, field: str = FIELD) -> dict[str, Any]:
    """The fields of the architecture that a checkpoint holds. Raises RecipeError."""
    path = directory / MANIFEST
    try:
        status = path.lstat()
        is_own = stat.S_ISREG(status.st_mode) and status.st_size <= MOST_BYTES  # no link, no pipe
        fields = json.loads(path.read_text(encoding="utf-8"))["architecture"] if is_own else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise RecipeError(f"{field}: {path} says no architecture", "try `shardwright checkpoint check`")
    return fields


def inherited_fields(model: ModelSpec, sequence_length: int | None) -> dict[str, Any]:
    """Fields of the model whose weights `init_from` names; with a sequence length, one that fits its window."""
    origin, directory = origin_of(model.init_from)
    if origin is Origin.CHECKPOINT:
        return saved_architecture(directory)
    config = read_config(directory, FIELD)
    if sequence_length is None:
        return dict(config.fields)
    longest = max(sequence_length, model.max_positions or 0)
    return config.within_window(longest, limited=model.max_positions is not None)
