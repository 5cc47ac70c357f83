"""The memory ledger of a rank: live tensors of training state, counted by category.

`plan.memory.estimated_memory` is what they are shown beside.
"""

from __future__ import annotations

from torch import Tensor

from shardwright.layout.flat import FlatLayout
from shardwright.optim.owned import Optimizer
from shardwright.parallel.compose import Runtime
from shardwright.record.records import MemoryRecord, Origin
from shardwright.units import Bytes


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _padding_share(layout: FlatLayout, begin: int, end: int) -> int:
    """Elements of begin..end that belong to no parameter."""
    return sum(max(0, min(end, stop) - max(begin, start)) for start, stop in layout.gaps)


def measured_memory(runtime: Runtime, optimizer: Optimizer, *, transient: bool) -> MemoryRecord:
    """Bytes of the tensors that exist now. `transient` false leaves out what is under way, as after a step."""
    totals: dict[str, int] = {"parameters": 0, "gradients": 0, "optimizer": 0, "communication": 0}
    padding = 0
    for unit in runtime.states.units:
        resident = unit.resident()
        resident["optimizer"] += [t for t in optimizer.state(unit.name).values() if t.dim() > 0]
        if not transient:
            resident["communication"] = []
        owned_padding = _padding_share(unit.layout, unit.begin, unit.end)
        for category, tensors in resident.items():
            totals[category] += _bytes(tensors)
            for tensor in tensors:
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
    )
