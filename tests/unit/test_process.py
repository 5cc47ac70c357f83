"""What a rank asks of its process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
