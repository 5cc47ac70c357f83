"""A channel for each direction of each link, as NCCL needs it: rings of an even and of an odd number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from layouts import LLAMA, plan_of

from shardwright.comm.job import Job
from shardwright.comm.launch import launch
from shardwright.comm.line import rounds
from shardwright.record.store import write_json
from shardwright.verify.compare import BARS, KINDS, compare
from shardwright.verify.reference import trace_one_device
from shardwright.verify.trace import read_traces

pytestmark = pytest.mark.world


@pytest.mark.parametrize("degree", range(1, 17))
def test_rounds_hold_every_link_of_the_ring_once_and_each_rank_once_at_most(degree: int) -> None:
    links = [link for links in rounds(degree) for link in links]
    ring = {frozenset((i, (i + 1) % degree)) for i in range(degree) if degree > 1}
    assert {frozenset(link) for link in links} == ring and len(links) == len(ring)
    for links in rounds(degree):
        members = [member for link in links for member in link]
        assert len(members) == len(set(members))


@pytest.mark.parametrize("pp", [3, 4])
def test_pipelines_run_over_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pp: int) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    plans = []
    for schedule, virtual in (("1f1b", 1), ("interleaved", 2), ("zbv", 2)):
        parallel = {"dp": 1, "pp": pp, "pipeline_schedule": schedule, "virtual_stages": virtual}
        model = LLAMA | {"kv_heads": 4, "layers": 8, "tied_embeddings": True}
        plans.append(plan_of(model, parallel, global_batch_size=5, micro_batch_size=1))
    for index, plan in enumerate(plans):
        (tmp_path / str(index)).mkdir()
        write_json(tmp_path / str(index) / "plan.json", plan.model_dump(mode="json"))
    folders = tuple(str(tmp_path / str(index)) for index in range(len(plans)))
    assert launch(Job(world_size=pp, entry="line_worker", arguments=folders)) == 0
    reference = trace_one_device(plans[0], 1)
    for folder, plan in zip(folders, plans, strict=True):
        found = compare(read_traces(Path(folder), pp), reference, plan, 1, {kind: BARS["fp64"] for kind in KINDS})
        assert found.missing is None and found.first_difference is None, found.first_difference
