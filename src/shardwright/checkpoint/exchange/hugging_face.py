"""The weights of a Hugging Face directory, read box by box.

The directory may come from anybody. Nothing in it is unpickled or executed, and no path in it leads elsewhere. Its
tensor files are memory-mapped, so that a rank reads the pages of its own boxes alone; they must not be rewritten while
they are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from shardwright.checkpoint.exchange.companions import CONFIG, read_companion
from shardwright.checkpoint.exchange.families import Stored, is_buffer, is_repeated, prefix_of, stored_tensors
from shardwright.checkpoint.files import TensorFile, one_line
from shardwright.errors import CheckpointError
from shardwright.layout.box import Box
from shardwright.spec.architecture import Architecture
from shardwright.spec.hf_config import read_config
from shardwright.spec.origin import FIELD

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_NAMED = 3  # tensors of one kind that an error names
_OTHER_COPY = "take another copy of the directory"


@dataclass(frozen=True)
class _Found:
    """A tensor of a file, under the name that the file gives it."""

    file: TensorFile
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.shape(self.key)

    def tensor(self) -> Tensor:
        return self.file.tensor(self.key)


class HuggingFaceWeights:
    """`Values` of an architecture from a directory with config.json and safetensors, whole or in shards.

    Making one reads the headers alone and checks every name and shape. Raises CheckpointError, and RecipeError about
    the config.json.
    """

    def __init__(self, directory: Path, architecture: Architecture, asked_by: str = FIELD) -> None:
        self.directory = directory
        self.config = read_companion(directory / CONFIG)
        fields = read_config(directory, asked_by).fields  # refuses mathematics that is not built
        self.family = str(self.config["model_type"])
        self._stored = {stored.ours: stored for stored in stored_tensors(architecture, self.family)}
        if architecture.tied_embeddings and not fields["tied_embeddings"]:
            raise CheckpointError(
                f"{directory}: has an output matrix of its own, and model.tied_embeddings = true",
                "what works: model.tied_embeddings = false",
            )
        self._found = self._gather(_open_files(directory), architecture)
        self._check(list(self._stored.values()))

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every stored value."""
        return reduce(torch.promote_types, (self._tensor(stored).dtype for stored in self._stored.values()))

    def read(self, box: Box, out: Tensor) -> None:
        """See `Values`."""
        stored = self._stored.get(box.name)
        if stored is None or stored.our_shape != box.tensor.shape:
            has = "no such tensor" if stored is None else list(stored.our_shape)
            raise CheckpointError(
                f"{self.directory}: {box.name} {list(box.tensor.shape)} is asked for, and there is {has}",
                "give the model the architecture of the directory's config.json",
            )
        out.view(box.size).copy_(_region(self._tensor(stored), stored, box))

    def _tensor(self, stored: Stored) -> Tensor:
        tensor = self._found[self._bare(stored.name)].tensor()
        if tensor.dtype not in _FLOATING:
            raise CheckpointError(
                f"{self.directory}: {stored.name} is stored as {str(tensor.dtype).removeprefix('torch.')}",
                "quantised weights are not read: what works is float32, bfloat16, float16 or float64",
            )
        return tensor

    def _bare(self, name: str) -> str:
        """A name without the prefix, which files of a model without its head leave out."""
        return name.removeprefix(prefix_of(self.family))

    def _gather(self, files: Iterable[TensorFile], architecture: Architecture) -> dict[str, _Found]:
        """Every tensor of the files that is not computed here, by its name without the prefix."""
        found: dict[str, _Found] = {}
        for file in files:
            for key in sorted(file.keys):
                if is_buffer(key) or is_repeated(key, architecture):
                    continue
                if self._bare(key) in found:
                    other = found[self._bare(key)]
                    where = f"{one_line(other.key)} of {other.file.path.name}"
                    raise CheckpointError(
                        f"{self.directory}: {one_line(key)} of {file.path.name} is also {where}", _OTHER_COPY
                    )
                found[self._bare(key)] = _Found(file, key)
        return found

    def _check(self, stored: Sequence[Stored]) -> None:
        """Every tensor is there, in its shape, and no other is."""
        names = {self._bare(one.name): one.name for one in stored}
        if missing := [name for bare, name in names.items() if bare not in self._found]:
            untied = missing == ["lm_head.weight"]
            raise CheckpointError(
                f"{self.directory}: {_listed(missing)} not there",
                "what works: model.tied_embeddings = true" if untied else f"{_OTHER_COPY}, or mend its {CONFIG}",
            )
        if extra := [found.key for bare, found in self._found.items() if bare not in names]:
            raise CheckpointError(
                f"{self.directory}: {_listed(extra)} not part of this model",
                f"its {CONFIG} and [model] must describe the model whose weights these are",
            )
        for one in stored:
            shape = self._found[self._bare(one.name)].shape
            if shape != one.shape:
                raise CheckpointError(
                    f"{self.directory}: {one.name} is {list(shape)} in its file, and [model] wants {list(one.shape)}",
                    f"what works: the sizes of its {CONFIG}" + _vocab_hint(one, shape),
                )


def _vocab_hint(stored: Stored, shape: tuple[int, ...]) -> str:
    vocabulary = stored.ours in ("embedding.tokens.weight", "head.output.weight") and len(shape) == 2
    return f", such as model.vocab = {shape[0]}" if vocabulary and shape[0] != stored.shape[0] else ""


def _listed(names: Sequence[str]) -> str:
    """ "a, b, c and 4 more are", of names."""
    text = ", ".join(map(one_line, names[:_NAMED]))
    more = len(names) - _NAMED
    return f"{text}{f' and {more} more' if more > 0 else ''} {'is' if len(names) == 1 else 'are'}"


def _region(tensor: Tensor, stored: Stored, box: Box) -> Tensor:
    """The part of a stored tensor that holds a box of ours, in our orientation."""
    *before, last = reversed(box.slices()) if stored.transposed else box.slices()
    part = tensor[(*before, slice(last.start + stored.begin, last.stop + stored.begin))]
    return part.T if stored.transposed else part


def _open_files(directory: Path) -> list[TensorFile]:
    """The directory's tensor files. Raises CheckpointError."""
    if os.path.lexists(directory / WHOLE):
        return [_open_file(directory, WHOLE)]
    if not os.path.lexists(directory / INDEX):
        pickled = sorted(path.name for path in directory.glob("*.bin")) if directory.is_dir() else []
        if pickled:
            raise CheckpointError(
                f"{directory}: has {pickled[0]} and no {WHOLE}; nothing is unpickled here",
                "save the model with safe_serialization=True",
            )
        raise CheckpointError(f"{directory}: has neither {WHOLE} nor {INDEX}", "give a model's directory")
    places = _weight_map(directory / INDEX)
    files = {name: _open_file(directory, name) for name in sorted(set(places.values()))}
    for key, name in places.items():
        if key not in files[name].keys:
            raise CheckpointError(
                f"{directory}: {INDEX} places {one_line(key)} in {name}, which does not have it", _OTHER_COPY
            )
    return list(files.values())


def _weight_map(path: Path) -> Mapping[str, str]:
    places = read_companion(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f'{path}: its "weight_map" does not say which file has which tensor', _OTHER_COPY)
    return places


def _open_file(directory: Path, name: str) -> TensorFile:
    """A safetensors file of the directory by its name alone.

    It may be a link, as all files are in snapshots of the Hugging Face cache: whatever the link leads to is only ever
    read as safetensors, and a file that is none is refused without a word of what is in it.
    """
    if not name.endswith(".safetensors") or any(c in name for c in "/\\\0"):
        raise CheckpointError(
            f"{directory}: {INDEX} names {name[:200]!r}", "what works: names of .safetensors files beside it"
        )
    path = directory / name
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such regular file", _OTHER_COPY)
    try:
        return TensorFile(path.resolve())
    except CheckpointError as error:
        link = f"{path} leads to " if path.is_symlink() else ""
        raise CheckpointError(f"{link}{error.problem}", error.way_out) from None
