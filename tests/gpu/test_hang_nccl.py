"""What gloo cannot show: NCCL holds up a stream and not the host, and its watchdog ends a process without a word."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

WORKER = Path(__file__).parent / "nccl_hang_worker.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def run(program: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command, WORKER, program],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | environment,
    )


def told(err: str) -> list[str]:
    """From the first line of a hang's report: where rank 0 is, where rank 1 is, and the way out."""
    lines = err.splitlines()
    first = lines.index("run.collective_timeout: a collective did not end within 5 s")
    return [line.strip().rpartition(" for ")[0] or line.strip() for line in lines[first + 1 : first + 4]]


TOLD = ["rank 0: F stage 0 microbatch 1, waits in all_reduce along shard for zero/second"]
TOLD += ["rank 1: F stage 0 microbatch 1, in no collective"]


@pytest.mark.parametrize("command", [(), TORCHRUN], ids=["launched", "torchrun"])
def test_the_stream_s_collective_is_told_and_not_where_the_host_is(command: tuple[str, ...]) -> None:
    done = run("absent", *command)
    assert done.returncode == 1
    assert told(done.stderr)[:2] == TOLD
    assert "rank 1 is in no collective: look there first" in done.stderr


def test_a_process_that_the_watchdog_ended_is_seen_too() -> None:
    done = run("absent", ONLY_WATCHDOG="1", TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC="1000")
    assert done.returncode == 1
    assert told(done.stderr)[:2] == TOLD


def test_ranks_that_do_not_hang_are_left_alone() -> None:
    done = run("busy")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" sums\n")
