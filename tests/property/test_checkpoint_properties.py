"""Checkpoints of random boxes: whatever boxes a tensor was written in, any box of it is read back to the bit."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwright.checkpoint.files import Entry, TensorFileWriter
from shardwright.checkpoint.load import Checkpoint
from shardwright.checkpoint.manifest import Manifest, StoredBox, StoredFile, write_manifest
from shardwright.errors import CheckpointError
from shardwright.layout.box import Box, GlobalTensor
from shardwright.spec.architecture import resolve_architecture
from shardwright.spec.model import ModelSpec

ARCHITECTURE = resolve_architecture(
    ModelSpec(layers=1, hidden=4, heads=2, ffn=4, vocab=5), sequence_length=4, tokenizer_vocab=None
)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MANY = settings(max_examples=150, deadline=None)

Ranges = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and size of a box."""


@dataclass(frozen=True)
class Written:
    """Tensors by kind and name, the dtype of each kind, and the boxes of each file, in their order."""

    tensors: dict[tuple[str, str], Tensor]
    kinds: dict[str, str]
    files: list[list[StoredBox]]

    def manifest(self, files: list[StoredFile]) -> Manifest:
        shapes = {name: tuple(tensor.shape) for (_, name), tensor in self.tensors.items()}
        fields = {"architecture": ARCHITECTURE, "dtype": "fp32", "kinds": self.kinds, "tensors": shapes}
        return Manifest.model_construct(**fields, files=tuple(files))  # not looked at: reading it has to

    @contextmanager
    def on_disk(self, listed: list[list[StoredBox]] | None = None) -> Iterator[Path]:
        """A directory with the files, whose manifest lists these boxes for them; by default what they hold."""
        with tempfile.TemporaryDirectory() as folder:
            files = []
            for index, boxes in enumerate(self.files):
                path = Path(folder) / f"part-{index}.safetensors"
                writer = TensorFileWriter(path, [self.entry(box) for box in boxes])
                for box in boxes:
                    writer.write(self.part(box))
                writer.close()
                told = tuple((listed or self.files)[index])
                files.append(StoredFile(name=path.name, bytes=writer.num_bytes, sha256=writer.sha256, boxes=told))
            write_manifest(Path(folder), self.manifest(files))
            yield Path(folder)

    def entry(self, box: StoredBox) -> Entry:
        return Entry(box.key, DTYPES[self.kinds[box.kind]], tuple(box.size))

    def part(self, box: StoredBox) -> Tensor:
        whole = self.tensors[box.kind, box.name]
        return whole[tuple(slice(o, o + s) for o, s in zip(box.offset, box.size, strict=True))]


def cut_up(draw: random.Random, shape: tuple[int, ...], cuts: int) -> list[Ranges]:
    """Boxes that cover a shape, each made by cutting another in two."""
    boxes: list[Ranges] = [((0,) * len(shape), shape)]
    for _ in range(cuts):
        offset, size = boxes.pop(draw.randrange(len(boxes)))
        dims = [dim for dim, length in enumerate(size) if length > 1]
        if not dims:
            boxes.append((offset, size))
            continue
        dim = draw.choice(dims)
        at = draw.randrange(1, size[dim])
        boxes.append((offset, (*size[:dim], at, *size[dim + 1 :])))
        moved = (*offset[:dim], offset[dim] + at, *offset[dim + 1 :])
        boxes.append((moved, (*size[:dim], size[dim] - at, *size[dim + 1 :])))
    return boxes


@st.composite
def checkpoints(draw: st.DrawFn) -> Written:
    """Up to three tensors of up to three dimensions, in one or two kinds, cut into boxes in up to four files."""
    shapes = draw(st.lists(st.lists(st.integers(1, 7), max_size=3).map(tuple), min_size=1, max_size=3))
    kinds = dict(zip(("weights", "exp_avg"), draw(st.lists(st.sampled_from(list(DTYPES)), min_size=1, max_size=2))))  # noqa: B905
    chance = random.Random(draw(st.integers(0, 2**32)))
    generator = torch.Generator().manual_seed(chance.randrange(2**32))
    tensors, boxes = {}, []
    for index, shape in enumerate(shapes):
        name = f"layers.{index}.weight"
        for kind, dtype in kinds.items():
            tensors[kind, name] = torch.randn(shape, generator=generator, dtype=torch.float64).to(DTYPES[dtype])
            cuts = cut_up(chance, shape, chance.randrange(9))
            boxes += [StoredBox(kind=kind, name=name, offset=offset, size=size) for offset, size in cuts]
    chance.shuffle(boxes)
    files: list[list[StoredBox]] = [[] for _ in range(chance.randrange(1, 5))]
    for box in boxes:
        chance.choice(files).append(box)
    return Written(tensors, kinds, files)


def drawn_box(draw: random.Random, tensor: GlobalTensor) -> Box:
    offset = tuple(draw.randrange(length) for length in tensor.shape)
    size = tuple(draw.randint(1, length - o) for o, length in zip(offset, tensor.shape, strict=True))
    return Box(tensor, offset, size)


def whole(name: str, tensor: Tensor) -> Box:
    return Box.whole(GlobalTensor(name, tuple(tensor.shape)))


@MANY
@given(checkpoints(), st.randoms(use_true_random=False), st.sampled_from(list(DTYPES.values())))
def test_any_box_is_the_slice_of_the_whole(written: Written, chance: random.Random, dtype: torch.dtype) -> None:
    with written.on_disk() as path:
        checkpoint = Checkpoint.open(path)
        checkpoint.check()
        for (kind, name), tensor in written.tensors.items():
            for _ in range(3):
                box = drawn_box(chance, GlobalTensor(name, tuple(tensor.shape)))
                out = torch.full((box.numel,), math.nan, dtype=dtype)
                checkpoint.kind(kind).read(box, out)
                assert torch.equal(out.view(box.size), tensor[box.slices()].to(dtype)), box


@MANY
@given(checkpoints(), st.randoms(use_true_random=False))
def test_a_part_that_is_not_listed_or_not_there_is_an_error(written: Written, chance: random.Random) -> None:
    index = chance.choice([i for i, boxes in enumerate(written.files) if boxes])
    gone = chance.randrange(len(written.files[index]))
    less = [list(boxes) for boxes in written.files]
    lost = less[index].pop(gone)
    with written.on_disk(listed=less) as path, pytest.raises(CheckpointError, match="once"):
        Checkpoint.open(path)
    with Written(written.tensors, written.kinds, less).on_disk(listed=written.files) as path:
        with pytest.raises(CheckpointError, match=r"does not hold|is to hold"):
            Checkpoint.open(path).check()
        tensor = written.tensors[lost.kind, lost.name]
        with pytest.raises(CheckpointError, match=r"does not hold|is to hold"):
            Checkpoint.open(path).kind(lost.kind).read(whole(lost.name, tensor), torch.empty(tensor.numel()))


@MANY
@given(checkpoints(), st.randoms(use_true_random=False))
def test_a_box_in_the_place_of_another_is_an_error_though_the_elements_are_as_many(
    written: Written, chance: random.Random
) -> None:
    listed = [list(boxes) for boxes in written.files]
    places = [(i, j) for i, boxes in enumerate(listed) for j in range(len(boxes))]
    i, j = chance.choice(places)
    box = listed[i][j]
    shape = written.tensors[box.kind, box.name].shape
    ways = [tuple(chance.randint(0, length - s) for s, length in zip(box.size, shape, strict=True)) for _ in range(9)]
    moved = [offset for offset in ways if offset != box.offset]
    if not moved:
        return
    listed[i][j] = box.model_copy(update={"offset": moved[0]})
    with written.on_disk(listed=listed) as path, pytest.raises(CheckpointError, match="once"):
        Checkpoint.open(path)
