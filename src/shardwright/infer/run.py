"""`shardwright generate`: start this machine's ranks, or join the job that is there."""

from __future__ import annotations

from dataclasses import replace

import torch

from shardwright.comm.job import Job, found_job
from shardwright.comm.launch import run
from shardwright.comm.machine import default_device
from shardwright.infer.out import check_out
from shardwright.infer.prepare import (
    FIELD,
    Request,
    ends_of,
    look_at_weights,
    plan_of,
    prompt_ids,
    spec_of,
    tokenizer_of,
)
from shardwright.plan.machine import num_cores
from shardwright.plan.plan import Plan
from shardwright.plan.world import local_world_size
from shardwright.spec.origin import origin_of

_ENTRY = "shardwright.infer.rank"


def generate(request: Request, *, as_json: bool = False) -> int:
    """Generate, print or write what comes, and return the exit code. Raises ShardwrightError for what can be refused
    before ranks start."""
    # A run that is being written has another newest checkpoint a moment later: it is settled here.
    request = replace(request, source=str(origin_of(request.source, FIELD)[1]))
    spec = spec_of(request.source, request.overrides)
    device = default_device() if spec.run.device == "auto" else spec.run.device
    place = found_job()
    world_size = local_world_size(spec, cores=num_cores(), gpus=torch.cuda.device_count())
    if place is not None:
        world_size = place.world_size
    plan = plan_of(spec, world_size, device)
    if request.out is not None and (place is None or place.rank == 0):
        check_out(request.out)
    _check(request, plan)
    job = Job(
        world_size=world_size,
        entry=_ENTRY,
        arguments=(request.to_json(), "json" if as_json else ""),
        device="cuda" if device == "cuda" else "cpu",
        to_lower="--batch-size",
        backend=spec.run.backend,
        grace_period=spec.run.grace_period_seconds,
        collective_timeout=spec.run.collective_timeout_seconds,
    )
    return run(job)


def _check(request: Request, plan: Plan) -> None:
    """Raises ShardwrightError for what every rank would come upon later."""
    model = plan.architecture
    tokenizer = tokenizer_of(request.source, plan.spec.data.separator)
    ends_of(request.source, tokenizer, request.settings, model.max_positions)
    prompt_ids(tokenizer, request.prompts, model.vocab, model.max_positions, request.origins)
    look_at_weights(request.source, plan)
