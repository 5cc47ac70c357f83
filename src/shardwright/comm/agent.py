"""The elastic agent of a run on one machine: it starts the ranks, notices the first that fails, and ends the rest.

Note: who may kill a rank. The agent of torch would send SIGTERM to the other ranks after a failure and wait 30 s for
those that do not obey, and a rank inside a collective does not. It would also raise on a signal of its own, and
lose the ranks it was just starting. So this agent settles everything before torch's looks: when torch's part polls
the ranks, either all run or all have ended. To a rank, SIGTERM thus means one thing: please stop.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from shardwright.comm.cause import Cause, Kind, first_cause
from shardwright.comm.folder import RunFolder
from shardwright.comm.hang import report
from shardwright.comm.job import Job
from shardwright.comm.store import HashStore
from shardwright.comm.whereabouts import Sighting
from shardwright.units import format_seconds

POLL = 0.05  # seconds between two looks at the ranks
SETTLE = 3.0  # seconds that a rank may lag behind the echoes of its end: a core dump, memory being given back


class Stopped(Exception):
    """All ranks have ended after a stop request; the text says how."""


class SoleNode(RendezvousHandler):
    """The rendezvous of one agent with itself, in memory: torch's own would open a socket on every interface."""

    def get_backend(self) -> str:
        return "sole-node"

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return "local"

    def shutdown(self) -> bool:
        return True


class Agent(LocalElasticAgent):
    """Runs a job's ranks to their end; `cause` is then the last failure's, if it failed.

    Raises Stopped when the ranks have ended after `signals`, the list that the launcher's handlers fill, had one.
    """

    def __init__(self, job: Job, folder: RunFolder, signals: list[signal.Signals], tell: Callable[[str], None]) -> None:
        spec = WorkerSpec(
            role="shardwright",
            local_world_size=job.world_size,
            rdzv_handler=SoleNode(),
            entrypoint=sys.executable,
            # -P: a file in the working directory must not stand in for a module of the library or of torch
            args=("-P", "-m", "shardwright.comm.rank", str(folder.path)),
            max_restarts=job.max_restarts,
            monitor_interval=POLL,
        )
        super().__init__(spec, DefaultLogsSpecs(log_dir=os.devnull))
        self._job, self._folder, self._signals, self._tell = job, folder, signals, tell
        self._attempt = 0
        self._deadline = float("inf")  # when ranks that were asked to stop are killed
        self._kills_before = _out_of_memory_kills()
        self.cause: Cause | None = None

    def _monitor_workers(  # pyright: ignore[reportIncompatibleVariableOverride]: torch's decorator has lost the type
        self, worker_group: WorkerGroup
    ) -> RunResult:
        self._ask_to_stop()
        if any(self._exit_codes().values()):
            self._end_failed()
        elif time.monotonic() > self._deadline and (late := self._running()):
            self._kill()
            ranks = ", ".join(map(str, late))
            raise Stopped(f"; killed after {format_seconds(self._job.grace_period)}: rank {ranks}")
        elif not self._running() and self._folder.stop_requested():
            raise Stopped("")
        return super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]

    def _ask_to_stop(self) -> None:
        """Pass on the first signal as a request and obey the second at once."""
        if len(self._signals) > 1:
            self._kill()
            raise Stopped("; a second signal ended the ranks at once")
        if self._signals and self._deadline == float("inf"):
            self._deadline = time.monotonic() + self._job.grace_period
            self._folder.request_stop(self._signals[0])
            for process in self._running().values():
                process.terminate()

    def _end_failed(self) -> None:
        """After a failure: find its cause, end every rank, and say whether the ranks start anew."""
        sightings = self._sightings()  # before anything else: ranks that are not stuck go on
        cause = self._settled_cause(sightings)
        if cause.kind is Kind.HANG:
            cause = replace(cause, text=report(self._job.collective_timeout, self._job.world_size, sightings))
        self._kill()
        if self._folder.stop_requested() and _is_part_of_stopping(cause):
            raise Stopped("")
        self.cause = cause
        if self._folder.stop_requested() or cause.kind is Kind.CONDITION:
            self._remaining_restarts = 0  # what a person has to mend would only come again
        if self._remaining_restarts > 0:
            self._attempt += 1
            self._tell(f"{cause.told()}\nstarting all ranks anew ({self._attempt} of {self._job.max_restarts})")

    def _sightings(self) -> dict[int, Sighting]:
        """Where the ranks are, those too that have ended; not those that never said it."""
        pages = {rank: self._folder.whereabouts(self._attempt, rank) for rank in range(self._job.world_size)}
        return {rank: Sighting.of(page.read_bytes()) for rank, page in pages.items() if page.exists()}

    def _settled_cause(self, sightings: Mapping[int, Sighting]) -> Cause:
        """The first cause that is no echo, waited for a little: the rank at fault may end after those it broke."""
        overdue = any(s.waiting and s.seconds >= self._job.collective_timeout for s in sightings.values())
        deadline = time.monotonic() + SETTLE
        while True:
            exits = self._exit_codes()  # before the causes: a rank tells its cause, then exits
            causes = self._folder.causes(self._attempt)
            for rank, code in exits.items():
                if code and rank not in causes and code == -signal.SIGABRT and overdue:
                    causes[rank] = Cause.of_hang(rank, "NCCL's watchdog ended it")
                elif code and rank not in causes:
                    out_of_memory = _out_of_memory_kills() > self._kills_before
                    causes[rank] = Cause.of_exit(rank, code, out_of_memory, self._job.to_lower)
            first = first_cause(causes.values())
            assert first is not None, "called after a rank has failed"
            if first.kind is not Kind.ECHO or not self._running() or time.monotonic() > deadline:
                return first
            time.sleep(0.02)

    def _processes(self) -> dict[int, Popen]:
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        return {rank: handler.proc for rank, handler in handlers.items()}

    def _running(self) -> dict[int, Popen]:
        return {rank: process for rank, process in self._processes().items() if process.poll() is None}

    def _exit_codes(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended. Popen keeps them, so torch's part finds them too."""
        codes = {rank: process.poll() for rank, process in self._processes().items()}
        return {rank: code for rank, code in codes.items() if code is not None}

    def _kill(self) -> None:
        """End the running ranks, with the processes that they started, and wait until they have ended."""
        running = self._running().values()
        for process in running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # each rank leads a session, and so a group, of its own
        deadline = time.monotonic() + SETTLE
        for process in running:
            with suppress(TimeoutExpired):  # asleep in the kernel: the agent waits longer, and reports it
                process.wait(max(0.0, deadline - time.monotonic()))

    def _shutdown(self, *arguments: Any, **settings: Any) -> None:  # they differ between versions of torch
        self._kill()
        super()._shutdown(*arguments, **settings)


def _is_part_of_stopping(cause: Cause) -> bool:
    """Whether a rank that was asked to stop may well end like this: SIGTERM before it could listen, or an echo."""
    return cause.may_follow or (cause.kind is Kind.SIGNAL and f"({signal.SIGTERM.name})" in cause.text)


def _out_of_memory_kills() -> int:
    """How many processes of this control group the kernel has killed for memory; 0 where it does not tell."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
        for line in (Path("/sys/fs/cgroup") / group / "memory.events").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0
