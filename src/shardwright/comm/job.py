"""What to run on every rank, and which rank this process is: found in the environment of torchrun or srun."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from shardwright.errors import RunError
from shardwright.units import Seconds

TO_LOWER = "train.micro_batch_size"
GRACE_PERIOD, COLLECTIVE_TIMEOUT = Seconds(30), Seconds(600)
FIRST_PORT, NUM_PORTS = 12_000, 20_000  # below the range from which the kernel hands out ports to outgoing connections


@dataclass(frozen=True)
class Job:
    """One program on `world_size` ranks: each calls `main(worker, arguments)` of the module named `entry`.

    `backend` "auto" is NCCL on GPUs, one for each rank, and gloo on CPUs; over gloo several ranks may share a GPU.
    A rank that has not left `grace_period` after a stop request is killed; a collective that takes longer than
    `collective_timeout` fails. After a failure all ranks are started anew, `max_restarts` times at most. `to_lower` is
    what a person lowers where memory runs out.
    """

    world_size: int
    entry: str
    arguments: tuple[str, ...] = ()
    device: Literal["cpu", "cuda"] = "cpu"
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    max_restarts: int = 0
    grace_period: Seconds = GRACE_PERIOD
    collective_timeout: Seconds = COLLECTIVE_TIMEOUT
    to_lower: str = TO_LOWER

    @property
    def resolved_backend(self) -> Literal["nccl", "gloo"]:
        """What "auto" is on the job's device. Raises RunError for NCCL on CPUs."""
        if self.backend == "nccl" and self.device == "cpu":
            raise RunError(
                f"run.backend: nccl moves the memory of GPUs, and the {self.world_size} ranks run on cpu",
                'what works: run.backend = "auto" or "gloo", or run.device = "cuda"',
            )
        if self.backend != "auto":
            return self.backend
        return "nccl" if self.device == "cuda" else "gloo"


class Source(StrEnum):
    """Who started this rank."""

    LOCAL = "shardwright"
    TORCHRUN = "torchrun"  # or whoever sets the same variables
    SRUN = "srun"


@dataclass(frozen=True)
class Place:
    """Which rank this process is, and the address and port where its world meets (a local world meets in a file)."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    source: Source
    address: str = "127.0.0.1"
    port: int = 0
    attempt: int = 0
    hosts_store: bool = False  # the store of the world lives in this process (torchrun's lives in its agent)


def found_job(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place in the job that torchrun or srun started, or None where neither did.

    Raises RunError where the environment names a rank and lacks the rest.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _torchrun(environment)
    if _is_srun_task(environment):
        return _srun(environment)
    return None


def _torchrun(environment: Mapping[str, str]) -> Place:
    return Place(
        rank=_number(environment, "RANK"),
        local_rank=_number(environment, "LOCAL_RANK"),
        world_size=_number(environment, "WORLD_SIZE"),
        local_world_size=_number(environment, "LOCAL_WORLD_SIZE", environment["WORLD_SIZE"]),
        source=Source.TORCHRUN,
        address=_text(environment, "MASTER_ADDR"),
        port=_number(environment, "MASTER_PORT"),
        attempt=_number(environment, "TORCHELASTIC_RESTART_COUNT", "0"),
        hosts_store=environment["RANK"] == "0" and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
    )


def _is_srun_task(environment: Mapping[str, str]) -> bool:
    """Whether Slurm started this process as one task of several.

    A batch script carries SLURM_PROCID=0 and the job's SLURM_NTASKS too, but is one process: waiting there for
    the other ranks would hang. Only a step has SLURM_STEP_*. A step of one task (an interactive shell, say)
    starts its own ranks.
    """
    if "SLURM_PROCID" not in environment or "SLURM_LOCALID" not in environment:
        return False
    if environment.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_NUM_TASKS" not in environment:
        return False
    return _srun_world_size(environment) > 1


def _srun_world_size(environment: Mapping[str, str]) -> int:
    return _number(environment, "SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))


def _srun(environment: Mapping[str, str]) -> Place:
    world_size = _srun_world_size(environment)
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    # The launching node may be a login node, where no rank runs: it is the last resort.
    address = first_node(nodes) if nodes else environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    job, step = _number(environment, "SLURM_JOB_ID", "0"), _number(environment, "SLURM_STEP_ID", "0")
    return Place(
        rank=_number(environment, "SLURM_PROCID"),
        local_rank=_number(environment, "SLURM_LOCALID"),
        world_size=world_size,
        local_world_size=_tasks_on_node(environment, world_size),
        source=Source.SRUN,
        address=environment.get("MASTER_ADDR", address),
        # Two jobs, or two steps of one job, that share a node must not meet: neighbouring steps are 97 ports apart.
        port=_number(environment, "MASTER_PORT", str(FIRST_PORT + (job + 97 * step) % NUM_PORTS)),
        attempt=_number(environment, "SLURM_RESTART_COUNT", "0"),
        hosts_store=environment["SLURM_PROCID"] == "0",
    )


def _tasks_on_node(environment: Mapping[str, str], world_size: int) -> int:
    """Ranks on this node, from a list such as 4(x2),3 over the nodes in order; the whole world where it is not told."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    if tasks is None:
        return world_size
    counts: list[int] = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(count)] * int(repeats or 1)
    return counts[min(_number(environment, "SLURM_NODEID", "0"), len(counts) - 1)]


def first_node(nodes: str) -> str:
    """The first host of a Slurm list: "gpu[07-09,12],login" is gpu07."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0])  # type: ignore[index]


def _text(environment: Mapping[str, str], name: str, default: str | None = None) -> str:
    value = environment.get(name) or default
    if value is None:
        raise RunError(
            f"{name}: not set, though the environment names a rank of a job",
            "start under torchrun or srun, or unset RANK and WORLD_SIZE to start local ranks",
        )
    return value


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    value = _text(environment, name, default)
    if not value.isdecimal():
        raise RunError(f"{name}: {value!r} is not a number", "torchrun and srun set it: do not set it by hand")
    return int(value)
