"""The notice board of a job that torchrun or srun started: where the first rank to fail says so to all others."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import NoReturn

from shardwright.comm.cause import Cause, Kind
from shardwright.comm.folder import is_running
from shardwright.comm.hang import report
from shardwright.comm.job import Place
from shardwright.comm.stop import leave_now
from shardwright.comm.store import Store, board_store
from shardwright.comm.whereabouts import Page, Sighting
from shardwright.units import Seconds

POLL = Seconds(0.5)  # seconds between two looks at the board
PATIENCE = Seconds(3.0)  # how long a rank with an echo waits for the cause, and one with a hang for where others are
FAREWELL = Seconds(6.0)  # how long a failed host of the store waits for its readers: one may have patience


class Board:
    """Keys in the world's store: the cause of the first failure, who has left, and where each rank's process is.

    A thread on each rank reads it, so that a rank inside a collective learns of a failure too. Ranks of one machine
    also look whether the others' processes still exist: one that was killed cannot write.
    """

    def __init__(self, place: Place, timeout: Seconds, page: Page) -> None:
        """`timeout` is that of collectives; `page` says where this rank is."""
        self._place, self._timeout, self._page = place, timeout, page
        self._world: Store | None = None
        self._store: Store | None = None
        self._closing = threading.Event()
        self._processes: dict[int, int] = {}  # of the other ranks of this machine, as they become known
        self._watcher = threading.Thread(target=self._watch, name="board", daemon=True)

    def open(self, world: Store) -> None:
        """Connect to the server behind the store `world`, and start to watch.

        The server would end with the process group, where nothing else holds it: the board does until it closes.
        """
        self._world = world
        store = board_store(self._place, self._timeout)
        store.set(f"process-{self._place.rank}", f"{_machine()} {os.getpid()}")
        self._store = store
        self._watcher.start()

    def fail(self, cause: Cause) -> NoReturn:
        """Print the cause, if it is the first and no echo of another, and end this process."""
        try:
            if cause.kind is Kind.ECHO:  # the watcher may end this process meanwhile: it sees what is behind the echo
                self._wait(lambda store: store.check(["cause"]), PATIENCE)
            self._closing.set()
            self._say_where()
            if self._claim(cause):
                cause = self._completed(cause)
                print(cause.told(), file=sys.stderr, flush=True)
            self._leave(FAREWELL)
        except RuntimeError:
            # The store is gone, and rank 0 or its agent with it. One rank tells, as no two can agree any more.
            if cause.kind is not Kind.ECHO or self._place.rank == 1:
                print(cause.told(), file=sys.stderr, flush=True)
        leave_now(1)

    def close(self) -> None:
        """Leave in peace. The rank that hosts the store stays until the others have left."""
        self._closing.set()
        self._watcher.join()
        with suppress(RuntimeError):  # the host has left already, or was killed after its work was done
            self._leave(self._timeout)

    def _say_where(self) -> None:
        """For the rank that tells a hang: the first that failed."""
        if self._store is not None:
            self._store.set(f"sighting-{self._place.rank}", json.dumps(asdict(Sighting.of(self._page))))

    def _completed(self, cause: Cause) -> Cause:
        """A hang is told by where all ranks are, as far as they say it in time."""
        if cause.kind is not Kind.HANG or self._store is None:
            return cause
        keys = {rank: f"sighting-{rank}" for rank in range(self._place.world_size)}
        sightings: dict[int, Sighting] = {}
        with suppress(RuntimeError):  # the store is gone: what has come is told
            self._wait(lambda store: store.check(list(keys.values())), PATIENCE)
            for rank, key in keys.items():
                if self._store.check([key]):
                    sightings[rank] = Sighting(**json.loads(self._store.get(key)))
        return replace(cause, text=report(self._timeout, self._place.world_size, sightings))

    def _claim(self, cause: Cause) -> bool:
        """Whether this is the first cause on the board. Before the store is reached every rank speaks for itself."""
        if self._store is None:
            return True
        text = cause.to_json()
        return self._store.compare_set("cause", "", text) == text.encode()

    def _leave(self, timeout: Seconds) -> None:
        if self._store is not None:
            self._store.set(f"left-{self._place.rank}", "")
            if self._place.hosts_store:
                others = [f"left-{rank}" for rank in range(self._place.world_size)]
                self._wait(lambda store: store.check(others), timeout)

    def _wait(self, met: Callable[[Store], bool], timeout: Seconds) -> None:
        deadline = time.monotonic() + timeout
        while self._store is not None and not met(self._store) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _watch(self) -> None:
        store = self._store
        assert store is not None
        try:
            while not self._closing.wait(POLL):
                if store.check(["cause"]):
                    self._say_where()
                    self._leave(FAREWELL)
                    leave_now(1)
                for rank in self._gone(store):
                    cause = Cause(rank, Kind.SIGNAL, time.time(), f"rank {rank} ended without a word: was it killed?")
                    self.fail(cause)
        except RuntimeError as error:
            # The main thread may be about to tell more: it has lost the same process.
            if not self._closing.wait(PATIENCE):
                self.fail(Cause.of_exception(self._place.rank, error))

    def _gone(self, store: Store) -> list[int]:
        """Ranks of this machine whose process has ended, though they have not left."""
        first = self._place.rank - self._place.local_rank
        for rank in range(first, first + self._place.local_world_size):
            if rank not in self._processes and store.check([f"process-{rank}"]):
                machine, process = store.get(f"process-{rank}").decode().rsplit(" ", 1)
                self._processes[rank] = int(process) if machine == _machine() else os.getpid()
        # The process first: a rank writes that it leaves, then ends.
        ended = [rank for rank, process in self._processes.items() if not is_running(process)]
        return [rank for rank in ended if not store.check([f"left-{rank}"])]


def _machine() -> str:
    """Where process ids mean the same: this host, in this pid namespace."""
    try:
        return f"{socket.gethostname()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()
