"""Ranks are started, joined and ended: every way out leaves one cause, one exit code and no process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from shardwright.comm.folder import remove_stale
from shardwright.comm.job import Job
from shardwright.comm.launch import launch

pytestmark = pytest.mark.world

HERE = Path(__file__).parent
LIMIT = 15.0  # seconds in which a failed run has to end


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for the ranks' files; whatever still runs at the end of a failed test is ended."""
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield tmp_path
    for process in ready_processes(tmp_path):
        if is_alive(process):
            os.kill(process, signal.SIGKILL)


@pytest.fixture
def launched(folder: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Launch a program from this process: its exit code and both outputs. `act` gets the ranks' ids when all run."""

    def run(program: str, act: Callable[[list[int]], None] | None = None, name: str = "ready", **fields: Any):
        acted: list[float] = []

        def act_when_ready() -> None:
            processes = ready(folder, fields.get("world_size", 2), name)
            acted.append(time.monotonic())
            assert act is not None
            act(processes)

        if act is not None:
            threading.Thread(target=act_when_ready, daemon=True).start()
        job = Job(**{"world_size": 2, "entry": "launch_worker", "arguments": (program, str(folder))} | fields)
        code = launch(job)
        assert act is None or time.monotonic() - acted[0] < LIMIT
        assert_nothing_left(folder, os.getpid())
        out, err = capfd.readouterr()
        return code, out, err

    return run


class Run:
    """A process of its own that launches, or is, a rank."""

    def __init__(self, folder: Path, program: str, command: tuple[str, ...] = (), **environment: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, *command, HERE / "launch_worker.py", '{"world_size": 2}', program, folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
            start_new_session=True,
        )

    def end(self, limit: float = LIMIT) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=limit)
        assert_nothing_left(self.folder, self.process.pid)
        return self.process.returncode, out, err


def ready(folder: Path, ranks: int = 2, name: str = "ready") -> list[int]:
    """Wait until every rank has written its file of that name; the ranks' process ids."""
    wait_until(lambda: all((folder / f"{name}-{rank}").exists() for rank in range(ranks)), 60)
    return ready_processes(folder)


def ready_processes(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in sorted(folder.glob("ready-*"))]


def assert_nothing_left(folder: Path, launcher: int) -> None:
    """No rank of the run, and no temporary folder of its launcher."""
    wait_until(lambda: not any(map(is_alive, ready_processes(folder))), 5)
    assert not list(Path(tempfile.gettempdir()).glob(f"shardwright-*-{launcher}-*"))


def wait_until(met: Callable[[], bool], limit: float) -> None:
    deadline = time.monotonic() + limit
    while not met():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_alive(process: int) -> bool:
    """Whether the process runs; one that only waits to be reaped has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def listening_addresses(processes: list[int]) -> set[str]:
    """The local addresses of listening TCP sockets that the processes hold, in the kernel's hexadecimal."""
    inodes = set()
    for process in processes:
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                addresses.add(fields[1].split(":")[0])
    return addresses


def test_clean_run_listens_on_the_loopback_alone(folder: Path) -> None:
    run = Run(folder, "clean")
    ranks = ready(folder)
    assert listening_addresses([run.process.pid, *ranks]) == {"0100007F"}
    (folder / "leave").touch()
    code, out, err = run.end()
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert sorted(out.splitlines()) == [f"rank {rank} of 2: sum 2, {threads} threads" for rank in (0, 1)]
    assert (code, err) == (0, "")


def test_condition_is_told_by_its_text_alone(launched) -> None:
    assert launched("condition") == (1, "", "data.corpus: nothing there\n  name another\n")


def test_defect_is_told_with_one_traceback_and_its_rank(launched) -> None:
    code, _, err = launched("defect")
    assert code == 1
    assert err.startswith("rank 1 failed:\nTraceback")
    assert err.endswith("ValueError: a defect\n")
    assert err.count("Traceback") == 1


def test_exit_without_a_word_is_told_by_its_code(launched) -> None:
    assert launched("exits") == (1, "", "rank 1 left with exit code 3\n")


def test_killed_rank_ends_the_run(launched) -> None:
    code, _, err = launched("waits", lambda ranks: os.kill(ranks[1], signal.SIGKILL))
    first, hint = err.splitlines()
    assert (code, first) == (1, "rank 1 was killed by signal 9 (SIGKILL)")
    assert "memory ran out" in hint


def test_killed_rank_ends_ranks_that_do_not_notice(launched) -> None:
    """Of three ranks, 1 is killed while 2 sleeps: no connection of its own tells rank 2."""
    end = launched("waits", lambda ranks: os.kill(ranks[1], signal.SIGUSR1), world_size=3)
    assert end == (1, "", "rank 1 was killed by signal 10 (SIGUSR1)\n")


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_stops_ranks_after_their_step(launched, number: signal.Signals, expected: int) -> None:
    code, out, err = launched("steps", lambda ranks: os.kill(os.getpid(), number), name="steps")
    assert (code, err) == (expected, f"stopped by {number.name}\n")
    assert sorted(out.splitlines()) == [f"rank {rank} left after its step" for rank in (0, 1)]


def test_signal_to_one_rank_stops_the_run(launched) -> None:
    code, _, err = launched("steps", lambda ranks: os.kill(ranks[1], signal.SIGTERM), name="steps")
    assert (code, err) == (143, "stopped by SIGTERM\n")


def test_second_signal_leaves_at_once(launched) -> None:
    def interrupt_twice(ranks: list[int]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        assert all(map(is_alive, ranks))
        os.kill(os.getpid(), signal.SIGINT)

    assert launched("waits", interrupt_twice) == (
        130,
        "",
        "stopped by SIGINT; a second signal ended the ranks at once\n",
    )


def test_ranks_that_do_not_stop_are_killed_after_the_grace_period(launched) -> None:
    end = launched("waits", lambda ranks: os.kill(os.getpid(), signal.SIGTERM), grace_period=0.5)
    assert end == (143, "", "stopped by SIGTERM; killed after 0.5 s: rank 0, 1\n")


def test_ranks_end_with_a_killed_launcher_and_the_next_one_removes_its_folder(folder: Path) -> None:
    run = Run(folder, "waits")
    ranks = ready(folder)
    run.process.kill()
    run.process.wait()
    wait_until(lambda: not any(map(is_alive, ranks)), 3)
    remove_stale()
    run.end()


def test_restart_recovers(launched) -> None:
    code, out, err = launched("fails_once", max_restarts=1)
    assert code == 0
    assert sorted(out.splitlines()) == [f"rank {rank}: second attempt, sum 2" for rank in (0, 1)]
    assert err.count("ValueError: a defect") == 1
    assert err.endswith("starting all ranks anew (1 of 1)\n")


def torchrun(folder: Path, program: str) -> Run:
    options = ("--standalone", "--nproc-per-node=2", f"--log-dir={folder / 'logs'}")  # else it litters /tmp
    return Run(folder, program, ("-m", "torch.distributed.run", *options))


def test_joins_torchrun(folder: Path) -> None:
    (folder / "leave").touch()
    code, out, _ = torchrun(folder, "clean").end(60)
    assert code == 0
    assert sorted(out.splitlines()) == [f"rank {rank} of 2: sum 2, 1 threads" for rank in (0, 1)]


def test_killed_rank_under_torchrun(folder: Path) -> None:
    run = torchrun(folder, "waits")
    os.kill(ready(folder)[1], signal.SIGKILL)
    code, _, err = run.end()
    assert code != 0
    assert err.count("rank 1 ended without a word") == 1
    assert "lost another rank" not in err


def srun(folder: Path, program: str) -> list[Run]:
    """Two tasks of a Slurm step on this machine, as Slurm would describe them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    step = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "localhost"}
    ranks = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
    return [Run(folder, program, **step, **rank, MASTER_PORT=port) for rank in ranks]


def test_joins_srun_and_stops_with_it(folder: Path) -> None:
    runs = srun(folder, "steps")
    ready(folder, name="steps")
    for run in runs:
        run.process.send_signal(signal.SIGTERM)
    ends = [run.end() for run in runs]
    assert [end[:2] for end in ends] == [(143, f"rank {rank} left after its step\n") for rank in (0, 1)]
    assert [err for *_, err in ends] == ["stopped by SIGTERM\n", ""]


def test_condition_is_told_once_under_srun(folder: Path) -> None:
    ends = [run.end(60) for run in srun(folder, "condition")]
    assert [code for code, *_ in ends] == [1, 1]
    assert "".join(err for *_, err in ends) == "data.corpus: nothing there\n  name another\n"


def test_lost_store_ends_ranks_under_srun(folder: Path) -> None:
    """Rank 0 hosts the store: when it is killed, the others can agree on nothing any more."""
    runs = srun(folder, "waits")
    os.kill(ready(folder)[0], signal.SIGKILL)
    code, _, err = runs[1].end()
    assert code == 1
    assert err.count("rank 1 lost another rank, and no rank told why:\n") == 1
    assert runs[0].end()[0] == -signal.SIGKILL
