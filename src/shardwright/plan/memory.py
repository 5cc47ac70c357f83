"""The training state that a plan will hold: what a rank's stages have, and what the formula makes of it."""

from __future__ import annotations

from shardwright.cost.memory import held_parameters, state_memory
from shardwright.plan.pipeline import placement_of
from shardwright.plan.plan import Plan
from shardwright.record.records import MemoryRecord


def parameters_of_rank(plan: Plan, rank: int) -> int:
    """Parameters in the stages of a rank, of each its part under `tp`, whoever owns them."""
    here, placed = plan.topology.coordinate(rank), placement_of(plan)
    return held_parameters(
        plan.architecture,
        plan.topology.tp,
        here.tp,
        layers=sum(layers for layers, of in zip(plan.layers_per_stage, placed, strict=True) if of == here.pp),
        embedding=placed[0] == here.pp,
        head=placed[-1] == here.pp,
    )


def parameters_of_stage(plan: Plan, stage: int) -> int:
    """Parameters that a stage needs, over all of `tp`; a tied matrix counts in the first stage and in the last."""
    first, last = stage == 0, stage == len(plan.layers_per_stage) - 1
    return held_parameters(plan.architecture, 1, 0, layers=plan.layers_per_stage[stage], embedding=first, head=last)


def estimated_memory(plan: Plan, rank: int) -> MemoryRecord:
    """The formula's value for a rank: its stages' parameters, their gradients and their optimizer state."""
    parallel = plan.spec.parallel
    return state_memory(
        parameters_of_rank(plan, rank),
        zero=parallel.zero,
        owners=plan.topology.shard,
        dtype=plan.dtype,
        grad_dtype=plan.grad_dtype,
        optimizer=plan.spec.train.optimizer,
        per_microbatch=parallel.zero_pipeline == "save_memory" or plan.num_microbatches == 1,
        rank=rank,
    )
