"""Runs that are killed or asked to stop at some moment end as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.kills import Kill, killed_run, straight_run, wait_for
from benchmarks.watched import STEPS, Run, differences, left_by, prepare, processes_of
from shardwright.record.store import read_lines
from shardwright.train.directory import RunDirectory

pytestmark = pytest.mark.world

SEED, KILLS = 4, 5
FULL = ("parallel.zero=3", "memory.offload=update")
PAIR = ("parallel.pp=1", "parallel.zero=2", "train.steps=60")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A working directory with a recipe and its text."""
    with tempfile.TemporaryDirectory() as path:
        prepare(Path(path))
        yield Path(path)


@pytest.fixture(scope="module")
def alone(folder: Path) -> RunDirectory:
    """A run on two ranks that nobody disturbed."""
    return straight_run(folder, PAIR)


@contextmanager
def running(folder: Path, name: str, *options: str) -> Iterator[Run]:
    run = Run(folder, name, *PAIR, *options)
    try:
        yield run
    finally:
        run.close()


def resumed(folder: Path, name: str, straight: RunDirectory) -> None:
    """Let a run go on to its end, which must be that of the other."""
    with running(folder, name, "--resume") as run:
        assert run.end() == 0, run.text
        assert "goes on from" in run.text
        assert left_by(run) == []
        assert list(differences(run.directory, straight)) == []


def reach(run: Run, step: int, saving: bool = False) -> None:
    met: Callable[[], bool] = lambda: run.step() >= step and bool(run.drafts() or not saving)  # noqa: E731
    assert wait_for(run, met), run.text


def test_five_killed_ranks_leave_no_trace(folder: Path) -> None:
    draw, part = random.Random(SEED), STEPS // KILLS
    kills = [Kill.draw(draw, i % 2 == 0, i * part, (i + 1) * part - 1) for i in range(KILLS)]
    found = killed_run(folder, "killed", FULL, kills, straight_run(folder, FULL))
    assert found.problems == [], found.text
    assert found.attempts == 1 + KILLS and all(found.struck), found.text
    assert len([one for one in found.struck if one and one["saving"]]) >= 2
    assert found.text.count("was killed by signal 9") == KILLS


def test_a_killed_launcher_takes_its_ranks_along_and_the_run_goes_on(folder: Path, alone: RunDirectory) -> None:
    with running(folder, "orphaned") as run:
        reach(run, 8, saving=True)
        run.process.kill()
        assert run.end() == -signal.SIGKILL
        assert wait_for(run, lambda: True) and not [one for one in left_by(run) if one.startswith("process")]
        left = run.process.pid
    resumed(folder, "orphaned", alone)
    assert not processes_of(left) and not list(Path(tempfile.gettempdir()).glob(f"shardwright-*-{left}-*"))


def test_runs_that_are_asked_to_stop_save_first_and_go_on(folder: Path, alone: RunDirectory) -> None:
    options: tuple[str, ...] = ()
    for step, number in ((4, signal.SIGTERM), (16, signal.SIGINT)):
        with running(folder, "asked", *options) as run:
            reach(run, step)
            os.kill(run.process.pid, number)
            assert run.end() == 128 + number, run.text
            assert f"stopped by {number.name}\n" in run.text
            assert left_by(run) == []
            last = [row["step"] for row in read_lines(run.directory.steps)][-1]
            assert step <= last < 60
            newest = run.directory.newest_checkpoint()
            assert newest is not None and newest.name == f"step-{last:08d}"
        options = ("--resume",)
    with running(folder, "asked", *options) as run:
        reach(run, 28)
        stuck = run.ranks()[1]
        os.kill(stuck, signal.SIGSTOP)  # so that the first request cannot be met
        os.kill(run.process.pid, signal.SIGTERM)
        assert wait_for(run, lambda: any(Path(tempfile.gettempdir()).glob(f"shardwright-*-{run.process.pid}-*/stop")))
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.process.wait(10) == 128 + signal.SIGTERM
        assert "a second signal ended the ranks at once" in run.text
        assert not [one for one in left_by(run) if one.startswith(("process", "shardwright"))]
    resumed(folder, "asked", alone)
