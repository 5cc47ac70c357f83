"""Run a job: on ranks that we start on this machine, or as one rank of the job that torchrun or srun started."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import FrameType

from torch.distributed.elastic.agent.server.api import RunResult

from shardwright.comm.agent import Agent, Stopped
from shardwright.comm.folder import RunFolder
from shardwright.comm.job import Job, found_job
from shardwright.comm.worker import attend
from shardwright.errors import RunError
from shardwright.plan.machine import num_cores

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(job: Job) -> int:
    """Run `job` and return the exit code: as one rank of the job found in the environment, else on ranks of our own.

    A found job has the world size that torchrun or srun gave it, not the one in `job`.
    """
    place = found_job()
    return launch(job) if place is None else attend(replace(job, world_size=place.world_size), place)


def launch(job: Job) -> int:
    """Run `job` on ranks started here, through torch's elastic agent, and return the exit code.

    0 when every rank left with 0; 1 after a failure, whose first cause is printed once; 128 + the signal's number
    after a stop request. No rank outlives this call, nor this process.
    """
    if job.world_size < 1:
        raise RunError(f"world size: {job.world_size} ranks cannot be started", "start at least 1")
    folder = RunFolder.create(job)
    signals: list[signal.Signals] = []
    try:
        with ExitStack() as stack:
            stack.enter_context(_environment(job))
            stack.enter_context(_taking(signals))
            stack.enter_context(_silent_agent())
            agent = Agent(job, folder, signals, _tell)
            try:
                result: RunResult = agent.run()  # pyright: ignore[reportAssignmentType]
            except Stopped as stopped:
                number = folder.stop_requested() or signals[0]
                _tell(f"stopped by {number.name}{stopped}")
                return 128 + number
        if result.is_failed():
            assert agent.cause is not None, "the agent ends failed ranks itself"
            _tell(agent.cause.told())
            return 1
        return 0
    finally:
        folder.remove()


def _tell(text: str) -> None:
    """Print to standard error, past the progress bar that a killed rank may have left on the terminal."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K\x1b[?25h")  # clear its line, show the cursor that it hid
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _taking(signals: list[signal.Signals]) -> Iterator[None]:
    """Append the stop signals to `signals` as they come; the agent reads the list at its next look.

    Python lets only the main thread set handlers: elsewhere the caller has to end its own process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def take(number: int, frame: FrameType | None) -> None:
        signals.append(signal.Signals(number))

    before = {number: signal.signal(number, take) for number in SIGNALS if not _is_ignored(number)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_ignored(number: signal.Signals) -> bool:
    """Under nohup SIGHUP is ignored, and has to stay so."""
    return number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


@contextmanager
def _environment(job: Job) -> Iterator[None]:
    """The environment that the ranks inherit: threads that share the cores, and sockets on the loopback alone."""
    settings = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, num_cores() // job.world_size))),
        "GLOO_SOCKET_IFNAME": LOOPBACK,  # else gloo listens where the host's name resolves to
        "NCCL_SOCKET_IFNAME": f"={LOOPBACK}",  # "=": this interface, not every one whose name begins so
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "",  # the agent would replace our handlers by ones that raise
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _silent_agent() -> Iterator[None]:
    """The agent logs what we tell better, and that we let it take no signals."""
    logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
