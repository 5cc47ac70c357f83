"""A Hugging Face directory turned into a checkpoint of weights alone, tensor after tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from shardwright.checkpoint.exchange.companions import copy_companions
from shardwright.checkpoint.exchange.draft import drafted
from shardwright.checkpoint.exchange.export import MAX_SHARD_BYTES, shards, tensors_of
from shardwright.checkpoint.exchange.hugging_face import HuggingFaceWeights
from shardwright.checkpoint.files import Entry, TensorFileWriter
from shardwright.checkpoint.manifest import (
    WEIGHTS,
    Manifest,
    StoredBox,
    StoredFile,
    companions_in,
    stored_dtype,
    write_manifest,
)
from shardwright.layout.box import Box, GlobalTensor
from shardwright.spec.architecture import Architecture, resolve_architecture
from shardwright.spec.hf_config import read_config
from shardwright.spec.model import ModelSpec
from shardwright.spec.origin import COMPANIONS


def adopt(
    source: Path,
    out: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[Manifest, tuple[str, ...]]:
    """Write the checkpoint `out`, which appears when it is whole; its manifest, and what a person should know of it.

    `progress` is told of the bytes of each tensor. Raises CheckpointError, and RecipeError for a model that is not
    built.
    """
    architecture, notes = architecture_of(source)
    weights = HuggingFaceWeights(source, architecture, "checkpoint import")
    with drafted(out) as draft:
        (draft / COMPANIONS).mkdir()
        copied = copy_companions(source, draft / COMPANIONS)
        tensors = tensors_of(architecture)
        files = _write(draft, weights, tensors, max_shard_bytes, progress)
        manifest = Manifest(
            architecture=architecture,
            dtype="bf16" if weights.dtype in (torch.bfloat16, torch.float16) else "fp32",
            kinds={WEIGHTS: stored_dtype(weights.dtype)},
            tensors={name: tensor.shape for name, tensor in tensors.items()},
            files=tuple(files),
            companions=companions_in(draft / COMPANIONS),
        )
        write_manifest(draft, manifest)
    return manifest, (*notes, *copied.left_out)


def architecture_of(source: Path) -> tuple[Architecture, tuple[str, ...]]:
    """The architecture of a directory's config.json, and what is left aside of it. Raises RecipeError."""
    config = read_config(source, "checkpoint import")
    most, notes = config.whole_window, config.notes
    if most is not None:
        notes = (*notes, f"attention slides over {most} positions there: the model is cut to sequences of as many")
    spec = ModelSpec(config=str(source), max_positions=most)
    return resolve_architecture(spec, sequence_length=1, tokenizer_vocab=None), notes


def _write(
    directory: Path,
    weights: HuggingFaceWeights,
    tensors: dict[str, GlobalTensor],
    max_shard_bytes: int,
    progress: Callable[[int], None],
) -> list[StoredFile]:
    boxes = [StoredBox(kind=WEIGHTS, name=t.name, offset=(0,) * len(t.shape), size=t.shape) for t in tensors.values()]
    stored = {box.key: box for box in boxes}
    files = []
    for number, run in enumerate(shards([Entry(b.key, weights.dtype, b.size) for b in boxes], max_shard_bytes)):
        path = directory / f"weights-{number:05d}.safetensors"
        writer = TensorFileWriter(path, run)
        for entry in run:
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            weights.read(Box.whole(tensors[stored[entry.key].name]), tensor)
            writer.write(tensor)
            progress(entry.num_bytes)
        writer.close()
        own = tuple(stored[entry.key] for entry in run)
        files.append(StoredFile(name=path.name, bytes=writer.num_bytes, sha256=writer.sha256, boxes=own))
    return files
