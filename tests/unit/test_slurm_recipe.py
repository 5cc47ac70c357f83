"""The batch file's decisions, with programs in Slurm's place that write down how they are called."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "slurm.sbatch"
START = (
    "srun --kill-on-bad-exit=0 shardwright train r.toml --run-dir runs/a --resume "
    "run.grace_period=270 s train.steps=5\n"
)
REQUEUE = "scontrol requeue 7\n"


@pytest.fixture
def batch(tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Run the file with a step that ends with `code`: its exit code, what it called, what it said."""

    def run(code: int, restarts: str | None = None, state: str = "RUNNING") -> tuple[int, str, str]:
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        programs = {
            "srun": f'echo "srun $*" >> {calls}; exit {code}',
            "scontrol": f'echo "scontrol $*" >> {calls}',
            "squeue": f"echo {state}",
        }
        for name, body in programs.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / name).chmod(0o755)
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        if restarts is not None:
            environment["SLURM_RESTART_COUNT"] = restarts
        arguments = ["r.toml", "runs/a", "train.steps=5"]
        done = subprocess.run(["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=20)
        return done.returncode, calls.read_text(), done.stderr

    return run


def test_it_is_a_script_that_bash_and_slurm_can_read() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    options = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in options
    assert "#SBATCH --signal=TERM@300" in options
    # Slurm reads options up to the first command only.
    assert SCRIPT.read_text().rindex("#SBATCH") < SCRIPT.read_text().index("\nset -u")


def test_a_complete_run_ends_the_job(batch) -> None:
    assert batch(0) == (0, START, "slurm.sbatch: the run is complete\n")


def test_a_run_that_was_stopped_goes_back_into_the_queue(batch) -> None:
    assert batch(143) == (0, START + REQUEUE, "slurm.sbatch: stopped before the time limit; start 2 follows\n")
    assert batch(143, "99")[1] == START + REQUEUE
    code, calls, said = batch(143, "100")
    assert (code, calls) == (143, START)
    assert "started anew 100 times already" in said


def test_a_cancelled_job_stays_cancelled(batch) -> None:
    code, calls, said = batch(143, state="COMPLETING")
    assert (code, calls) == (143, START)
    assert said.endswith("slurm.sbatch: the job is COMPLETING: it is not put back into the queue\n")


def test_a_failed_run_is_tried_again_a_few_times(batch) -> None:
    assert batch(1, "1") == (0, START + REQUEUE, "slurm.sbatch: failed with exit code 1; start 3 follows\n")
    said = "slurm.sbatch: failed with exit code 1 after 2 restarts: not tried again (MAX_RETRIES=2)\n"
    assert batch(1, "2") == (1, START, said)


def test_what_cannot_work_is_not_tried_again(batch) -> None:
    code, calls, said = batch(2)
    assert (code, calls) == (2, START)
    assert "cannot work" in said
