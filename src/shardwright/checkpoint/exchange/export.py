"""Weights written as a Hugging Face directory, tensor after tensor: at most one is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwright.checkpoint.exchange.companions import CONFIG, Copied, complete_tokenizer, copy_companions
from shardwright.checkpoint.exchange.draft import drafted
from shardwright.checkpoint.exchange.families import Stored, family_of, stored_tensors
from shardwright.checkpoint.exchange.hugging_face import INDEX, WHOLE
from shardwright.checkpoint.files import Entry, TensorFileWriter
from shardwright.data.file import write_json
from shardwright.layout.box import Box, GlobalTensor
from shardwright.nn.decoder import Decoder
from shardwright.nn.initial import Values
from shardwright.nn.parameters import pieces_of
from shardwright.spec.architecture import Architecture
from shardwright.spec.hf_export import hf_config

MAX_SHARD_BYTES = 5_000_000_000
_WINDOW = 1 << 22  # elements of a tensor that are turned at a time
_QWEN2_TOKENIZER = (
    "AutoTokenizer of transformers 5 puts Qwen 2's own rules in the place of a qwen2 model's tokenizer: "
    "load this one with PreTrainedTokenizerFast"
)
_FORMAT = {"format": "pt"}  # transformers before 5 refuses a file that does not say it


@dataclass(frozen=True)
class Exported:
    """What was written: the family, the bytes of all tensors, the files, and what a person should know of them."""

    family: str
    num_bytes: int
    files: tuple[str, ...]
    notes: tuple[str, ...]


def export(
    values: Values,
    architecture: Architecture,
    out: Path,
    *,
    base_config: Mapping[str, Any] | None = None,
    companions: Path | None = None,
    dtype: torch.dtype | None = None,
    source_dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] = lambda _: None,
) -> Exported:
    """Write the directory `out`, which appears when it is whole.

    `base_config` is the config.json that the model was imported with: its family is kept, and what it says beside the
    architecture. `companions` is a directory of small files to go along, `dtype` that of the weights, by default
    `source_dtype`. `progress` is told of the bytes of each tensor. Raises CheckpointError.
    """
    family = family_of(architecture) if base_config is None else str(base_config.get("model_type"))
    weights = _Weights(values, tensors_of(architecture), dtype or source_dtype)
    tensors = _by_stored_name(stored_tensors(architecture, family))
    with drafted(out) as draft:
        num_bytes = _write_weights(draft, weights, tensors, max_shard_bytes, progress)
        copied = copy_companions(companions, draft) if companions is not None else Copied((), ())
        ids = complete_tokenizer(draft, architecture.max_positions)
        base = {**(base_config or {}), **ids}
        write_json(draft / CONFIG, hf_config(architecture, family, base, str(weights.dtype).removeprefix("torch.")))
        files = tuple(sorted(path.name for path in draft.iterdir()))
    replaced = (_QWEN2_TOKENIZER,) if ids and family == "qwen2" else ()
    return Exported(family, num_bytes, files, copied.left_out + replaced)


def _by_stored_name(tensors: Sequence[Stored]) -> dict[str, list[Stored]]:
    """Our tensors that make up each of the stored ones."""
    groups: dict[str, list[Stored]] = {}
    for stored in tensors:
        groups.setdefault(stored.name, []).append(stored)
    return groups


def shards(entries: Sequence[Entry], most: int) -> list[list[Entry]]:
    """Entries in order, in runs of at most `most` bytes; a tensor larger than that is alone."""
    runs: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not runs or entry.num_bytes > room:
            runs.append([])
            room = most
        runs[-1].append(entry)
        room -= entry.num_bytes
    return runs


def tensors_of(architecture: Architecture) -> dict[str, GlobalTensor]:
    """The tensors of a model, by name."""
    with torch.device("meta"):
        model = Decoder(architecture)
    boxes = (piece.box for pieces in pieces_of(model).values() for piece in pieces)
    return {box.name: box.tensor for box in boxes}


@dataclass(frozen=True)
class _Weights:
    """Stored tensors made from those of ours that they consist of."""

    values: Values
    tensors: Mapping[str, GlobalTensor]
    dtype: torch.dtype

    def assembled(self, parts: Sequence[Stored]) -> Tensor:
        """A stored tensor; `parts` are all that it has."""
        whole = torch.empty(parts[0].shape, dtype=self.dtype)
        for stored in parts:
            tensor = self.tensors[stored.ours]
            place = whole.narrow(-1, stored.begin, tensor.shape[0 if stored.transposed else -1])
            if stored.transposed:
                self._read_turned(tensor, place)
            else:
                self.values.read(Box.whole(tensor), place)
        return whole

    def _read_turned(self, tensor: GlobalTensor, place: Tensor) -> None:
        """Read a matrix into its transposed place, some rows at a time."""
        rows, columns = tensor.shape
        step = max(1, _WINDOW // columns)
        for first in range(0, rows, step):
            box = Box(tensor, (first, 0), (min(step, rows - first), columns))
            part = torch.empty(box.size, dtype=self.dtype)
            self.values.read(box, part)
            place[:, first : first + box.size[0]] = part.T


def _write_weights(
    directory: Path,
    weights: _Weights,
    tensors: Mapping[str, Sequence[Stored]],
    max_shard_bytes: int,
    progress: Callable[[int], None],
) -> int:
    """Returns the bytes of all tensors."""
    runs = shards([Entry(name, weights.dtype, parts[0].shape) for name, parts in tensors.items()], max_shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(runs):05d}.safetensors" for i in range(len(runs))]
    names = names if len(runs) > 1 else [WHOLE]
    for name, run in zip(names, runs, strict=True):
        writer = TensorFileWriter(directory / name, run, _FORMAT)
        for entry in run:
            writer.write(weights.assembled(tensors[entry.key]))
            progress(entry.num_bytes)
        writer.close()
    num_bytes = sum(entry.num_bytes for run in runs for entry in run)
    if len(runs) > 1:
        places = {entry.key: name for name, run in zip(names, runs, strict=True) for entry in run}
        write_json(directory / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": places})
    return num_bytes
