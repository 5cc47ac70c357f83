"""A copy of what a rank saves, in host memory that is kept: training goes on while it is written.

Note: kept buffers. Fresh memory costs a page fault for every 4 KiB, several times what the copy costs. So the copy's
memory is made once, touched, and used for every save; on GPUs it is pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from shardwright.checkpoint.files import Entry, TensorFileWriter
from shardwright.checkpoint.manifest import WEIGHTS, Part, StoredBox, StoredDtype, StoredFile
from shardwright.checkpoint.state import random_states, written_ranges
from shardwright.optim.optimizers import SGD, AdamW
from shardwright.parallel.compose import Runtime
from shardwright.parallel.offload.memory import HostMemory


class Snapshot:
    """The state that a rank writes, as it was at the last `take`. `optimizer` None: the weights alone."""

    def __init__(self, runtime: Runtime, optimizer: AdamW | SGD | None) -> None:
        self._runtime, self._device = runtime, runtime.mesh.device
        self._moments = optimizer.names if optimizer is not None else ()
        self._ranges = list(written_ranges(runtime, optimizer))  # of memory that stays where it is
        boxes = [found.stored for found in self._ranges]
        self._boxes: tuple[StoredBox, ...] = tuple(boxes)
        self._entries = [
            Entry(box.key, found.values.dtype, tuple(box.size)) for box, found in zip(boxes, self._ranges, strict=True)
        ]
        self._host = HostMemory(self._device, "checkpoint.every")
        self._copy = self._host.zeros(sum(entry.num_bytes for entry in self._entries), torch.uint8)
        self._copy.fill_(1)  # zeros alone would not touch it
        self._random: list[tuple[str, Tensor]] = []

    @property
    def num_bytes(self) -> int:
        """Host memory that it keeps."""
        return self._copy.numel()

    @property
    def kinds(self) -> dict[str, StoredDtype]:
        """The kinds of tensor in it, on whichever rank, and their dtype: the masters'."""
        dtype: StoredDtype = "F64" if self._runtime.plan.dtype == "fp64" else "F32"
        return dict.fromkeys((WEIGHTS, *self._moments), dtype)

    @torch.no_grad()
    def take(self) -> None:
        """Copy the state as the last update left it. Training may go on when it returns."""
        for unit in self._runtime.states.units:
            unit.updated_values()  # waits until they are there
        self._runtime.states.home.settle()
        for found, part in zip(self._ranges, self._parts(), strict=True):
            part.view(found.values.dtype).copy_(found.values, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._random = random_states(self._device)

    def _parts(self) -> Iterator[Tensor]:
        """The bytes of each range in the copy."""
        begin = 0
        for entry in self._entries:
            yield self._copy[begin : begin + entry.num_bytes]
            begin += entry.num_bytes

    def write(self, directory: Path) -> Part:
        """Write the copy into a directory as this rank's file, and return its part of the manifest. Raises OSError."""
        entries = [*self._entries, *(Entry(key, torch.uint8, tuple(state.shape)) for key, state in self._random)]
        path = directory / file_name(self._runtime.mesh.rank)
        path.unlink(missing_ok=True)  # of a save that failed
        writer = TensorFileWriter(path, entries)
        writer.write_bytes(self._copy)
        for _, state in self._random:
            writer.write_bytes(state)
        writer.close()
        file = StoredFile(name=path.name, bytes=writer.num_bytes, sha256=writer.sha256, boxes=self._boxes)
        return Part(file=file, tensors={found.box.name: found.box.tensor.shape for found in self._ranges})


def file_name(rank: int) -> str:
    """The tensor file of a rank."""
    return f"rank-{rank:05d}.safetensors"
