"""A collective that does not end is told by where every rank was, whoever started the ranks."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shardwright.comm.job import Job
from shardwright.comm.launch import launch
from shardwright.units import Seconds

pytestmark = pytest.mark.world

HERE = Path(__file__).parent
TIMEOUT = 2
FIRST = f"run.collective_timeout: a collective did not end within {TIMEOUT} s"
LAST = "rank 1 is in no collective: look there first; if that is slow and not stuck, raise run.collective_timeout"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Launch a program that hangs, on ranks of this process, and return the lines that it told."""
    monkeypatch.syspath_prepend(HERE)

    def run(program: str, world_size: int = 2, timeout: float = TIMEOUT) -> list[str]:
        limit = Seconds(timeout)
        job = Job(world_size=world_size, entry="hang_worker", arguments=(program,), collective_timeout=limit)
        assert launch(job) == 1
        return plain(capfd.readouterr().err)

    return run


def plain(text: str) -> list[str]:
    """Lines without how long a rank was in one place, which has to be as long as the timeout allows."""
    lines = []
    for line in text.splitlines():
        if found := re.search(r" for ([0-9.]+) s$", line):
            assert 1 < float(found[1]) < TIMEOUT + 15, line  # a busy machine looks late
            line = line[: found.start()]
        lines.append(line.strip())
    return lines


def test_a_stage_that_hangs_is_seen_in_its_action_and_its_neighbour_in_its_receive(launched) -> None:
    assert launched("hook", timeout=4) == [  # on a busy machine the first microbatch takes a while
        FIRST.replace(f"{TIMEOUT} s", "4 s"),
        "rank 0: B stage 0 microbatch 1, waits in receive along pp for pipeline/gradient",
        "rank 1: F stage 1 microbatch 1, in no collective",
        LAST,
    ]


def test_ranks_in_one_place_share_a_line(launched) -> None:
    assert launched("absent", 3) == [
        FIRST,
        "ranks 0-1: update, waits in all_reduce along shard for zero/norm",
        "rank 2: update, in no collective",
        LAST.replace("rank 1", "rank 2"),
    ]


def test_ranks_that_wait_for_each_other(launched) -> None:
    assert launched("both_receive") == [
        FIRST,
        "rank 0: prepare, waits in receive along pp for test/from-1",
        "rank 1: prepare, waits in receive along pp for test/from-0",
        "all wait, in different collectives: a message was lost, or the ranks' collectives differ in their order",
    ]


def test_an_abort_after_the_timeout_is_a_hang_and_one_before_it_is_not(launched, monkeypatch) -> None:
    monkeypatch.setenv("ABORT_AFTER", str(TIMEOUT + 0.2))
    assert launched("aborts") == [
        FIRST,
        "rank 0: prepare, waits in all_gather along shard for zero/gather",
        "rank 1: prepare, in no collective",
        LAST,
    ]
    monkeypatch.setenv("ABORT_AFTER", "0.1")
    assert launched("aborts") == ["rank 0 was killed by signal 6 (SIGABRT)"]


def started(command: list[str], **environment: str) -> subprocess.Popen[str]:
    program = [HERE / "hang_worker.py", json.dumps({"world_size": 2, "collective_timeout": TIMEOUT}), "absent"]
    return subprocess.Popen(
        [sys.executable, *command, *program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


TOLD = [
    FIRST,
    "rank 0: update, waits in all_reduce along shard for zero/norm",
    "rank 1: update, in no collective",
    LAST,
]


def test_a_hang_under_torchrun_is_told_once(tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--log-dir={tmp_path}"]
    process = started(command)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    told = plain(err)
    assert [line for line in told if line in TOLD] == TOLD
    assert err.count("in no collective") == 2
    assert "lost another rank" not in err


def test_a_hang_under_srun_is_told_once_and_ends_all_ranks() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    step = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "localhost"}
    ranks = [started([], **step, SLURM_PROCID=rank, SLURM_LOCALID=rank, MASTER_PORT=port) for rank in "01"]
    began = time.monotonic()
    errors = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1]
    assert plain("".join(errors)) == TOLD
    assert time.monotonic() - began < 30
