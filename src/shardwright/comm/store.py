"""The stores in which ranks find each other: a file on one machine, a TCP store where torchrun or srun started them."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import FileStore, HashStore, PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from shardwright.comm.job import Place
from shardwright.units import Seconds

__all__ = ["HashStore", "Store", "board_store", "local_store", "world_store"]


def local_store(path: Path, place: Place) -> Store:
    """The store of a local run. torch's TCP store would listen on every interface, even for one machine."""
    return FileStore(str(path), place.world_size)


def world_store(place: Place, timeout: Seconds) -> Store:
    """The store of a found job: rank 0 hosts it, or torchrun's agent does and says so in the environment."""
    os.environ |= {"MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)}
    store, _, _ = next(iter(rendezvous("env://", place.rank, place.world_size, timeout=timedelta(seconds=timeout))))
    return PrefixStore("world", store)


def board_store(place: Place, timeout: Seconds) -> Store:
    """The same store over a connection of its own: the world's is taken while a rank waits for another."""
    store = TCPStore(place.address, place.port, is_master=False, timeout=timedelta(seconds=timeout))
    return PrefixStore(f"board-{place.attempt}", store)
