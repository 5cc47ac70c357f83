"""A rank: it joins its world, runs the job's program, and tells why if it fails."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist

from shardwright.comm.board import Board
from shardwright.comm.cause import Cause
from shardwright.comm.job import Job, Place, Source
from shardwright.comm.mesh import Groups, Mesh
from shardwright.comm.process import give_way_in_transport, keep_freed_memory, run_as_batch
from shardwright.comm.stop import StopRequest, follow_parent, leave_now, listening
from shardwright.comm.store import Store, world_store
from shardwright.comm.watch import MARGIN, StreamWhereabouts, Watch
from shardwright.comm.whereabouts import SIZE, Page, Whereabouts
from shardwright.errors import RunError, ShardwrightError
from shardwright.layout.mesh import Topology
from shardwright.plan.machine import num_cores
from shardwright.units import Seconds

JOINING = Seconds(60.0)  # ranks may be this late to join each other, also where collectives have less time


@dataclass(frozen=True)
class Worker:
    """What a program is told about the rank it runs on. Its world's default process group exists."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    stop: StopRequest
    is_local: bool  # all ranks are on this machine, started by our launcher
    attempt: int = 0  # how often the ranks were started anew
    whereabouts: Whereabouts = field(default_factory=Whereabouts)
    groups: Groups = field(default_factory=Groups)

    def mesh(self, topology: Topology) -> Mesh:
        """A topology laid over the job's ranks. Meshes share process groups, and are seen on this rank's page."""
        return Mesh(topology, self.device, groups=self.groups, whereabouts=self.whereabouts)


@contextmanager
def joined(place: Place, job: Job, stop: StopRequest, store: Store, whereabouts: Whereabouts) -> Iterator[Worker]:
    """This rank in its world. The process group ends with the block, if that ends well.

    After an exception it is left as it is: ending it could wait for ranks that will not answer.
    """
    backend = job.resolved_backend
    own = rank_device(place, job.device, shared=backend == "gloo")
    if own.type == "cuda":
        torch.cuda.set_device(own)
    else:
        keep_freed_memory()
        run_as_batch()  # before gloo starts its threads
    timeout = job.collective_timeout + (MARGIN if backend == "nccl" else 0)
    whereabouts.begin("join")
    dist.init_process_group(
        backend=backend,
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=max(timeout, JOINING)),
        device_id=own if backend == "nccl" else None,  # connects now, and names the device of a barrier
    )
    is_local = place.source is Source.LOCAL
    groups = Groups(timedelta(seconds=timeout))  # else they would have torch's default
    if backend == "gloo" and _more_than_cores(place):
        groups.when_made = give_way_in_transport
    whereabouts.begin("prepare")
    yield Worker(
        place.rank, place.local_rank, place.world_size, own, stop, is_local, place.attempt, whereabouts, groups
    )
    dist.destroy_process_group()


def rank_device(place: Place, device: Literal["cpu", "cuda"], *, shared: bool = False) -> torch.device:
    """The device of this rank; where GPUs are `shared` ranks take turns. Raises RunError where there is none for it."""
    if device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # srun may show each of its tasks one GPU of its own
    index = 0 if place.source is Source.SRUN and count == 1 else place.local_rank
    if shared and count:
        index %= count
    if index >= count:
        raise RunError(
            f"run.device: {place.local_world_size} ranks on this machine need a GPU each, and torch finds {count}",
            f"start {count} ranks here, set run.backend = gloo so that ranks share GPUs, or set run.device = cpu"
            if count
            else "set run.device = cpu",
        )
    return torch.device("cuda", index)


def serve(
    job: Job,
    place: Place,
    stop: StopRequest,
    store: Callable[[], Store],
    page: Page,
    fail: Callable[[Cause], NoReturn],
) -> None:
    """Run the job's program as one rank of the world that meets in `store`.

    `page` is where it says its whereabouts. `fail` is called, from another thread, when the program has waited in one
    collective of NCCL for too long; gloo raises in the program.
    """
    program = load_program(job.entry)
    overdue = partial(fail, Cause.of_hang(place.rank, "NCCL did not end it"))
    with _said(page, job, overdue) as whereabouts, joined(place, job, stop, store(), whereabouts) as worker:
        program(worker, job.arguments)


@contextmanager
def _said(page: Page, job: Job, overdue: Callable[[], NoReturn]) -> Iterator[Whereabouts]:
    """The whereabouts of this rank, looked at in between where gloo does not."""
    if job.resolved_backend == "gloo":
        yield Whereabouts(page)
        return
    whereabouts = StreamWhereabouts(page)
    watch = Watch(whereabouts, job.collective_timeout, overdue)
    watch.start()
    try:
        yield whereabouts
    finally:
        watch.close()


def load_program(entry: str) -> Callable[[Worker, tuple[str, ...]], Any]:
    """The function `main` of the module named `entry`."""
    return importlib.import_module(entry).main


def attend(job: Job, place: Place) -> int:
    """Run the job as one rank of a world that torchrun or srun started, and return this process's exit code.

    There is no launcher of ours: ranks tell each other through the world's store that one has failed, and the first
    to fail prints its cause. A rank that fails, or learns that another has, does not return: its process ends with 1.
    """
    stop = StopRequest()
    deadline = threading.Timer(job.grace_period, leave_now)
    deadline.daemon = True

    def take(number: signal.Signals) -> None:
        if stop.requested:
            leave_now(128 + number)
        stop.request(number)
        deadline.args = [stop.exit_code]
        deadline.start()

    if "TORCHELASTIC_RUN_ID" in os.environ:
        follow_parent(os.getppid())  # torchrun's ranks are in sessions of their own too
    _share_cores(place)
    page = bytearray(SIZE)
    board = Board(place, job.collective_timeout, page)

    def store() -> Store:
        world = world_store(place, Seconds(max(job.collective_timeout, JOINING)))
        board.open(world)
        return world

    def fail(cause: Cause) -> NoReturn:
        if stop.requested and cause.may_follow:
            leave_now(stop.exit_code)  # another rank left first
        board.fail(cause)

    with listening(take):
        try:
            serve(job, place, stop, store, page, fail)
        except BaseException as error:
            if not (isinstance(error, SystemExit) and not error.code):
                fail(Cause.of_exception(place.rank, error))
        board.close()
    deadline.cancel()
    if stop.requested and place.rank == 0:
        print(f"stopped by {stop.requested}", file=sys.stderr, flush=True)
    return stop.exit_code


def refuse(place: Place, error: ShardwrightError) -> NoReturn:
    """End a rank that torchrun or srun started and that has met an error before its world did, as `attend` would: the
    first rank to meet it tells it for all."""
    board = Board(place, JOINING, bytearray(SIZE))
    try:
        board.open(world_store(place, JOINING))
    except (RuntimeError, OSError):  # there is no world: each speaks for itself
        raise error from None
    board.fail(Cause.of_exception(place.rank, error))


def _share_cores(place: Place) -> None:
    """Leave the other ranks of this machine their cores, unless someone has set or bound them already."""
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "sched_getaffinity"):
        return
    if _unbound():
        torch.set_num_threads(max(1, num_cores() // place.local_world_size))


def _unbound() -> bool:
    """Whether this rank may use all cores of the machine; srun can bind each of its tasks to some."""
    return num_cores() == os.cpu_count()


def _more_than_cores(place: Place) -> bool:
    """Whether the ranks of this machine take turns on its cores."""
    return _unbound() and place.local_world_size > num_cores()
