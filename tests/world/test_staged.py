"""Verbs through host memory do what the direct ones do: to the bit, with the same ledger, under a whole layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import LLAMA, plan_of
from pool import Place, Pool
from torch import Tensor

from shardwright.comm.collectives import (
    Handle,
    Staged,
    all_gather,
    all_reduce,
    barrier,
    broadcast_text,
    reduce_scatter,
    share,
)
from shardwright.comm.job import Job, Source
from shardwright.comm.job import Place as RankPlace
from shardwright.comm.launch import launch
from shardwright.comm.line import Line, exchange_sum, receive, send
from shardwright.comm.mesh import Axis, Mesh, Transport
from shardwright.comm.worker import rank_device
from shardwright.errors import RunError
from shardwright.layout.mesh import Topology
from shardwright.record.store import write_json
from shardwright.verify.compare import BARS, KINDS, compare
from shardwright.verify.reference import trace_one_device
from shardwright.verify.trace import read_traces, trace_layout, write_trace

pytestmark = pytest.mark.world

Verb = Callable[..., Handle]
VERBS: dict[str, Verb] = {"all_reduce": all_reduce, "all_gather": all_gather, "reduce_scatter": reduce_scatter}
LENGTH = 24


def mesh_of(place: Place, topology: Topology, transport: Transport) -> Mesh:
    ranks = range(topology.world_size)
    return Mesh(topology, torch.device("cpu"), groups=place.groups, ranks=ranks, rank=place.rank, transport=transport)


def values(axis: Axis, dtype: torch.dtype) -> Tensor:
    return torch.randn(LENGTH, generator=torch.Generator().manual_seed(axis.index)).to(dtype)


def run_verb(place: Place, name: str, degree: int, dtype: torch.dtype) -> list[tuple[Tensor, list, str]]:
    """In a rank: what a verb leaves, its ledger and the kind of its handle, directly and staged."""
    found = []
    for transport in (Transport.DIRECT, Transport.STAGED):
        mesh = mesh_of(place, Topology(shard=degree), transport)
        tensor = values(mesh.shard, dtype)
        handle = VERBS[name](tensor, mesh.shard, reason="test")
        handle.wait()
        handle.wait()  # as often as one likes
        left = share(tensor, mesh.shard, mesh.shard.index) if name == "reduce_scatter" else tensor
        found.append((left.clone(), mesh.ledger.as_records(), type(handle).__name__))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("name", VERBS)
def test_collectives(pool: Pool, name: str, degree: int, dtype: torch.dtype) -> None:
    for direct, staged in pool.run(degree, run_verb, name, degree, dtype):
        assert torch.equal(direct[0], staged[0])
        assert direct[1] == staged[1] and len(direct[1]) == 1
        assert (direct[2], staged[2]) == ("_Pending", Staged.__name__)


def run_result_is_late(place: Place) -> tuple[bool, bool]:
    """In a rank: whether the input may be written after the verb, and whether a result shows before the wait."""
    mesh = mesh_of(place, Topology(shard=2), Transport.STAGED)
    tensor = values(mesh.shard, torch.float64)
    expected = values(mesh.shard, torch.float64) + torch.randn(
        LENGTH, generator=torch.Generator().manual_seed(1 - mesh.shard.index)
    ).to(torch.float64)
    before = tensor.clone()
    handle = all_reduce(tensor, mesh.shard, reason="test")
    untouched = torch.equal(tensor, before)
    handle.wait()
    return untouched, torch.equal(tensor, expected)


def test_a_result_comes_with_the_wait(pool: Pool) -> None:
    assert pool.run(2, run_result_is_late) == [(True, True)] * 2


def run_line(place: Place, transport: Transport) -> tuple[Tensor, Tensor, list, int]:
    """In a rank of a line of two: what it received, a sum of both, the ledger, and how many channels it made."""
    mesh = mesh_of(place, Topology(pp=2), transport)
    line = Line.of(mesh)
    own = values(line.axis, torch.bfloat16).view(4, 6).T  # a view: [6, 4], not contiguous in memory
    received = torch.zeros(LENGTH, dtype=torch.bfloat16)
    if line.index == 0:
        handles = [send(own.contiguous(), line, 1, reason="a"), send(own.contiguous() + 1, line, 1, reason="a")]
    else:
        earlier = torch.zeros(LENGTH, dtype=torch.bfloat16)
        handles = [receive(earlier, line, 0, reason="a"), receive(received, line, 0, reason="a")]
    for handle in handles:
        handle.wait()
    total = values(line.axis, torch.float64)
    exchange_sum(total, line, 1 - line.index, reason="b").wait()
    return received, total, mesh.ledger.as_records(), len(line.channels)


def test_along_the_pipeline(pool: Pool) -> None:
    direct, staged = (pool.run(2, run_line, transport) for transport in (Transport.DIRECT, Transport.STAGED))
    for one, other in zip(direct, staged, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2:] == other[2:]
    assert staged[1][0].any() and staged[0][3] == 0
    assert torch.equal(staged[0][1], staged[1][1])


def run_text(place: Place) -> str:
    mesh = mesh_of(place, Topology(replicate=3), Transport.STAGED)
    barrier(mesh.world)
    return broadcast_text("naïve" if mesh.rank == 0 else None, mesh.world, torch.device("meta"))


def test_text_goes_through_the_host_whatever_the_device(pool: Pool) -> None:
    assert pool.run(3, run_text) == ["naïve"] * 3


def write_staged(place: Place, plan: Any, folder: Path) -> None:
    mesh = mesh_of(place, plan.topology, Transport.STAGED)
    write_trace(folder, mesh.rank, trace_layout(plan, mesh, 2))


PARALLEL: list[dict[str, Any]] = [
    {"dp": 2, "tp": 2, "zero": 3},
    {"dp": 2, "pp": 2, "zero": 2, "pipeline_schedule": "zbv", "virtual_stages": 2},
    {"dp": 1, "tp": 2, "pp": 2, "pipeline_schedule": "zb-h1"},
    {"dp": 4, "dp_shard": 2, "zero": 1},
]


@pytest.mark.parametrize("parallel", PARALLEL, ids=str)
def test_layouts(pool: Pool, tmp_path: Path, parallel: dict[str, Any]) -> None:
    model = LLAMA | {"kv_heads": 4, "layers": 4, "tied_embeddings": True}
    plan = plan_of(model, parallel, global_batch_size=16)
    pool.run(plan.world_size, write_staged, plan, tmp_path)
    bars = {kind: BARS["fp64"] for kind in KINDS}
    found = compare(read_traces(tmp_path, plan.world_size), trace_one_device(plan, 2), plan, 2, bars)
    assert found.missing is None and found.first_difference is None, found.first_difference


def test_three_dimensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    plan = plan_of(LLAMA | {"kv_heads": 4}, {"dp": 2, "tp": 2, "pp": 2, "zero": 3}, global_batch_size=4)
    write_json(tmp_path / "plan.json", plan.model_dump(mode="json"))
    assert launch(Job(world_size=8, entry="staged_worker", arguments=(str(tmp_path),))) == 0
    bars = {kind: BARS["fp64"] for kind in KINDS}
    found = compare(read_traces(tmp_path, 8), trace_one_device(plan, 2), plan, 2, bars)
    assert found.missing is None and found.first_difference is None, found.first_difference


def test_ranks_take_turns_on_shared_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(local_rank: int, source: Source = Source.LOCAL, *, shared: bool) -> torch.device:
        return rank_device(RankPlace(local_rank, local_rank, 4, 4, source), "cuda", shared=shared)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device(rank, shared=True).index for rank in range(4)] == [0, 1, 0, 1]
    assert device(1, shared=False).index == 1
    with pytest.raises(RunError) as caught:
        device(2, shared=False)
    assert str(caught.value) == "run.device: 4 ranks on this machine need a GPU each, and torch finds 2\n" + (
        "  start 2 ranks here, set run.backend = gloo so that ranks share GPUs, or set run.device = cpu"
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RunError, match="torch finds 0"):
        device(0, shared=True)
