"""What a rank asks of its process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.comm.job import Place, Source
from shardwright.comm.worker import _more_than_cores

PROGRAM = """
import os, threading
from shardwright.comm.process import run_as_batch
assert run_as_batch()
found = []
thread = threading.Thread(target=lambda: found.append(os.sched_getscheduler(0)))
thread.start(); thread.join()
assert [os.sched_getscheduler(0), *found] == [os.SCHED_BATCH] * 2
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has batch jobs")
def test_threads_started_later_are_of_the_batch_job() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


GROUP = """
import os, sys, torch.distributed as dist
from datetime import timedelta
from shardwright.comm.mesh import Groups
from shardwright.comm.process import GIVES_WAY, give_way_in_transport, transport_threads
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
groups = Groups(timedelta(seconds=9))
groups.when_made = give_way_in_transport
groups.get((0,), "one")
threads = transport_threads()
assert threads and {os.getpriority(os.PRIO_PROCESS, t) for t in threads} == {GIVES_WAY}, threads
assert os.getpriority(os.PRIO_PROCESS, 0) == 0
dist.destroy_process_group()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priorities of their own")
def test_the_threads_of_a_group_give_way(tmp_path: Path) -> None:
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([sys.executable, "-c", GROUP, str(tmp_path / "store")], check=True, env=environment)


@pytest.mark.parametrize(
    ("machine", "own", "ranks", "shares"), [(2, 2, 8, True), (8, 8, 8, False), (32, 4, 8, False), (2, 2, 2, False)]
)
def test_ranks_share_cores_where_they_are_more(
    machine: int, own: int, ranks: int, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where each is bound to some of the machine's."""
    monkeypatch.setattr("shardwright.comm.worker.num_cores", lambda: own)
    monkeypatch.setattr("os.cpu_count", lambda: machine)
    place = Place(rank=0, world_size=ranks, local_rank=0, local_world_size=ranks, source=Source.SRUN)
    assert _more_than_cores(place) == shares
