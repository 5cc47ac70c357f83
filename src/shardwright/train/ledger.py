"""The memory ledger of a rank: live tensors, counted by category.

`plan.memory.estimated_memory` is what they are shown beside.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from shardwright.layout.flat import FlatLayout
from shardwright.optim.owned import Optimizer
from shardwright.parallel.compose import Runtime
from shardwright.parallel.zero.unit import CATEGORIES
from shardwright.record.records import MemoryRecord, Origin
from shardwright.train.live import LiveTensors
from shardwright.units import Bytes


class StepMemory:
    """Measures the memory of the step that runs inside it: `record` is there afterwards.

    What rests is read between the step's first two microbatches, or after the step where it has one. The most that is
    live is counted throughout; it stays 0 on CPUs with compiled kernels, which cannot be watched.
    """

    def __init__(self, runtime: Runtime, optimizer: Optimizer) -> None:
        self._runtime, self._optimizer = runtime, optimizer
        self._resting: MemoryRecord | None = None
        self._live: AbstractContextManager[object] = nullcontext()
        self.record: MemoryRecord | None = None

    def __enter__(self) -> StepMemory:
        resident = self._runtime.states.resident(self._optimizer)
        self._at_first = sum(_bytes(tensors) for category, tensors in resident.items() if category != "host")
        device = self._runtime.mesh.device
        self._runtime.pipeline.between = self._between
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return self
        if self._runtime.plan.spec.run.compile:
            return self  # compiled kernels cannot run under a dispatch mode: the peaks stay uncounted
        state = [tensor for tensors in resident.values() for tensor in tensors]
        state += [unit.whole for unit in self._runtime.states.units]
        live = LiveTensors([tensor.untyped_storage() for tensor in state])
        self._runtime.mesh.ledger.watcher = live.note_transfer
        self._live = live
        live.__enter__()
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        self._live.__exit__(error, *rest)  # type: ignore[arg-type]
        self._runtime.pipeline.between = self._runtime.mesh.ledger.watcher = None
        if error is None:
            resting = self._resting or measured_memory(self._runtime, self._optimizer, transient=False)
            self.record = replace(resting, **self._peaks())

    def _between(self) -> None:
        self._runtime.pipeline.between = None
        self._resting = measured_memory(self._runtime, self._optimizer, transient=True)

    def _peaks(self) -> dict[str, Bytes]:
        """On CUDA the allocator's, which does not tell transfers from activations."""
        if isinstance(self._live, LiveTensors):
            live = self._live
            return {"activations": Bytes(live.peak_activations), "peak": Bytes(self._at_first + live.peak)}
        if self._runtime.mesh.device.type != "cuda":
            return {}
        peak = torch.cuda.max_memory_allocated(self._runtime.mesh.device)
        return {"activations": Bytes(peak - self._at_first), "peak": Bytes(peak)}


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _padding_share(layout: FlatLayout, begin: int, end: int) -> int:
    """Elements of begin..end that belong to no parameter."""
    return sum(max(0, min(end, stop) - max(begin, start)) for start, stop in layout.gaps)


def measured_memory(runtime: Runtime, optimizer: Optimizer, *, transient: bool) -> MemoryRecord:
    """Bytes of the tensors that exist now. `transient` false leaves out what is under way, as after a step."""
    totals = {category: 0 for category in CATEGORIES}
    padding = 0
    for unit, resident in runtime.states.resident_by_unit(optimizer):
        if not transient:
            resident["communication"] = []
        owned_padding = _padding_share(unit.layout, unit.begin, unit.end)
        for category, tensors in resident.items():
            totals[category] += _bytes(tensors)
            for tensor in tensors if category != "host" else ():
                elements = unit.layout.padding if tensor.numel() == unit.layout.length else owned_padding
                padding += elements * tensor.element_size()
    return MemoryRecord(
        origin=Origin.MEASURED,
        rank=runtime.mesh.rank,
        parameters=Bytes(totals["parameters"]),
        gradients=Bytes(totals["gradients"]),
        optimizer=Bytes(totals["optimizer"]),
        communication=Bytes(totals["communication"]),
        padding=Bytes(padding),
        offload=Bytes(_bytes(runtime.states.home.buffers())),
        host=Bytes(totals["host"]),
    )
