"""`shardwright train`: start this machine's ranks, or join the job that is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shardwright.comm.job import Job, found_job
from shardwright.comm.launch import run
from shardwright.comm.machine import default_device
from shardwright.spec.load import load
from shardwright.train.prepare import Request, prepare_run

_ENTRY = "shardwright.train.rank"


def train(recipe: str, overrides: Sequence[str] = (), run_dir: str | None = None, *, resume: bool = False) -> int:
    """Train a recipe and return the exit code. Raises ShardwrightError for what can be refused before ranks start.

    `resume` goes on from the newest good checkpoint of `run_dir`, or of the recipe's newest run; where there is no run
    yet, one is started.
    """
    request = Request(recipe, tuple(overrides), run_dir, resume)
    spec = load(recipe, overrides)
    device = default_device() if spec.run.device == "auto" else spec.run.device
    place = found_job()
    if place is None:
        prepared = prepare_run(request, None, device)
        world_size, directory = prepared.plan.world_size, str(prepared.directory.path)
        request = replace(request, resume=prepared.resume)
    else:
        world_size, directory = place.world_size, ""
    job = Job(
        world_size=world_size,
        entry=_ENTRY,
        arguments=(directory, request.to_json()),
        device="cuda" if device == "cuda" else "cpu",
        backend=spec.run.backend,
        max_restarts=spec.run.max_restarts,
        grace_period=spec.run.grace_period_seconds,
        collective_timeout=spec.run.collective_timeout_seconds,
    )
    return run(job)
