"""One pool of gloo ranks for all world tests, and small plans to run on it.

Starting processes, importing torch and connecting them costs seconds; a job on ranks that wait costs a millisecond. So
the ranks are started once, lent to one test at a time, and replaced when a test breaks them. A job is an importable
function: the first N ranks call it with their `Place` and the job's arguments. A failed or late job leaves ranks inside
collectives that nobody will answer, so the whole pool is killed then, and the next job starts another.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import combinations
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardwright.comm.cause import Cause, Kind, first_cause
from shardwright.comm.mesh import Groups, Mesh
from shardwright.layout.mesh import Topology
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.spec.load import build

SIZE = 4
COLLECTIVE_TIMEOUT = timedelta(seconds=30)
_LIMIT = 60.0  # seconds for a job, from sending it to the last rank's result
_ECHO_WAIT = 2.0  # seconds for a cause to arrive after a rank told that it lost another
_PRELOADED = ["pytest", "shardwright.train.loop", "shardwright.verify.run", "torch.testing"]


class AllGroups(Groups):
    """Every group of the pool's ranks, made by all of them at the start.

    torch names a group by its ranks and by how many groups this process has made, so members whose histories differ,
    as those of the pool's ranks do, would wait for each other under different names.
    """

    def __init__(self) -> None:
        super().__init__(COLLECTIVE_TIMEOUT)
        for size in range(2, SIZE + 1):
            for ranks in combinations(range(SIZE), size):
                group = dist.new_group(list(ranks), timeout=COLLECTIVE_TIMEOUT)
                if isinstance(group, dist.ProcessGroup):
                    self._made[ranks, ""] = group

    def get(self, ranks: tuple[int, ...], purpose: str = "") -> dist.ProcessGroup:
        """The group of these ranks, in whichever order they are named."""
        return self._made[tuple(sorted(ranks)), purpose]


@dataclass
class Place:
    """What a job gets to know in a rank."""

    rank: int
    groups: Groups

    def mesh(self, topology: Topology) -> Mesh:
        """A topology laid over the pool's first ranks."""
        ranks = range(topology.world_size)
        return Mesh(topology, torch.device("cpu"), groups=self.groups, ranks=ranks, rank=self.rank)


class RankFailed(Exception):
    """A rank raised, died or did not answer; `cause` is the first true one, with the rank's own traceback."""

    def __init__(self, cause: Cause) -> None:
        self.cause = cause
        super().__init__(cause.told())


@dataclass
class _Rank:
    process: Any
    connection: Connection


class Pool:
    """SIZE ranks, started by the first job. A context manager: leaving it ends them."""

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def processes(self) -> list[int]:
        """Process ids of the ranks that run now."""
        return [rank.process.pid for rank in self._ranks]

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any, limit: float = _LIMIT) -> list[Any]:
        """Call function(place, *arguments) on the first `world_size` ranks; their results in order.

        Raises RankFailed.
        """
        assert 1 <= world_size <= SIZE
        if not self._ranks:
            self._start()
        job = pickle.dumps((function, arguments))
        try:
            for rank in self._ranks[:world_size]:
                rank.connection.send_bytes(job)
            return self._collect(world_size, time.monotonic() + limit)
        except BaseException:
            self.end()
            raise

    def _collect(self, world_size: int, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        causes: list[Cause] = []
        waiting = {rank.connection: index for index, rank in enumerate(self._ranks[:world_size])}
        while waiting and not any(cause.kind is not Kind.ECHO for cause in causes):
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                index = waiting.pop(connection)  # pyright: ignore[reportArgumentType]
                answer = self._answer(index)
                if isinstance(answer, Cause):
                    causes.append(answer)
                    deadline = min(deadline, time.monotonic() + _ECHO_WAIT)
                else:
                    results[index] = answer[0]
        if waiting and not causes:
            late = sorted(waiting.values())
            causes.append(Cause(late[0], Kind.EXCEPTION, time.time(), f"ranks {late} did not answer in time"))
        if cause := first_cause(causes):
            raise RankFailed(cause)
        return [results[index] for index in range(world_size)]

    def _answer(self, index: int) -> tuple[Any] | Cause:
        rank = self._ranks[index]
        try:
            return pickle.loads(rank.connection.recv_bytes())
        except EOFError:
            rank.process.join()
            return Cause.of_exit(index, rank.process.exitcode, out_of_memory=False)

    def _start(self) -> None:
        # A server that has imported everything and computed nothing is forked for each rank: torch is imported once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._folder = tempfile.TemporaryDirectory(prefix="shardwright-pool-")
        for index in range(SIZE):
            ours, theirs = context.Pipe()
            arguments = (index, Path(self._folder.name) / "store", theirs)
            process = context.Process(target=_serve, args=arguments, name=f"rank-{index}", daemon=True)
            process.start()
            theirs.close()
            self._ranks.append(_Rank(process, ours))

    def end(self) -> None:
        """Kill the ranks and wait for them; the next job starts new ones."""
        for rank in self._ranks:
            rank.process.kill()
            rank.process.join()
            rank.connection.close()
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _serve(rank: int, store: Path, connection: Connection) -> None:
    """A rank: jobs from the connection, until its other end is gone."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), SIZE), rank=rank, world_size=SIZE, timeout=COLLECTIVE_TIMEOUT
    )
    place = Place(rank, AllGroups())
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_outcome(place, job))


def _outcome(place: Place, job: bytes) -> bytes:
    try:
        function, arguments = pickle.loads(job)
        return pickle.dumps((function(place, *arguments),))
    except BaseException as error:
        return pickle.dumps(Cause.of_exception(place.rank, error))


# Plans to run on it

TINY = {"layers": 2, "hidden": 16, "heads": 2, "kv_heads": 1, "ffn": 24, "vocab": 37}
BATCH = 72  # sequences: divides by every dp up to 4 times every number of microbatches up to 3
SPLITS = [
    (world // shard, shard) for world in range(1, SIZE + 1) for shard in range(1, world + 1) if world % shard == 0
]
"""Every (replicate, shard) of 1 to SIZE ranks."""


def tiny_plan(replicate: int = 1, shard: int = 1, num_microbatches: int = 1, **sections: dict[str, Any]) -> Plan:
    """A small model on replicate x shard ranks, in fp64 and clipped to a norm that bites; sections go over its recipe,
    and a model takes the place of TINY."""
    dp = replicate * shard
    batch = sections.get("train", {}).get("global_batch_size", BATCH)
    recipe: dict[str, dict[str, Any]] = {
        "model": {} if "model" in sections else TINY,
        "train": {
            "steps": 3,
            "sequence_length": 5,
            "global_batch_size": batch,
            "micro_batch_size": batch // (dp * num_microbatches),
            "dtype": "fp64",
            "lr": 1e-2,
            "lr_schedule": "linear",
            "warmup_steps": 0,
            "max_grad_norm": 0.05,
        },
        "parallel": {"dp": dp, "dp_shard": shard},
    }
    for name, fields in sections.items():
        recipe[name] = recipe.get(name, {}) | fields
    return resolve(build(recipe), world_size=dp, device="cpu", native_bf16=True, tokenizer_vocab=None)
