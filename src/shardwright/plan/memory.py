"""The memory that a plan will take, rank by rank: what rests between microbatches, and the most of a step."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from shardwright.cost.activations import EmbeddingTape, HeadTape, LayerTape
from shardwright.cost.memory import BYTES, held_parameters, state_memory, streamed_bytes
from shardwright.cost.shapes import Shapes
from shardwright.cost.step import Block, Replay, StageTape, Zero
from shardwright.layout.chunk import CACHED_ELEMENTS, UPDATE_ELEMENTS, slot_elements
from shardwright.plan.pipeline import computing_schedule_of, placement_of, schedule_of
from shardwright.plan.plan import Plan
from shardwright.plan.units import RankUnits, recompute_settings, representative, shapes_of, units_of
from shardwright.record.records import MemoryRecord
from shardwright.units import Bytes, parse_bytes

_MOST_ACTIONS = 20_000
"""Of larger schedules the transfers are left out of the replay: they take long to place, and weigh little."""


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
    """What a rank will hold: its state between microbatches, padding included, and the most of a step."""
    here = plan.topology.coordinate(rank)
    return replace(_estimated(plan, here.pp, representative(plan, here.tp)), rank=rank)


@lru_cache(maxsize=512)
def _estimated(plan: Plan, pp: int, tp: int) -> MemoryRecord:
    """Ranks that differ only along the data axes hold the same."""
    parallel, units = plan.spec.parallel, units_of(plan, pp, tp)
    lengths = units.lengths
    owners = plan.topology.shard if parallel.zero >= 1 else 1
    resting = _state(plan, sum(lengths), owners)
    rank = plan.topology.rank(replace(plan.topology.coordinate(0), pp=pp, tp=tp))
    bare = _state(plan, parameters_of_rank(plan, rank), owners)
    slots = _slots(plan, max(lengths) // owners)
    zero = _zero(plan, owners)
    tape = _replay(plan, units, zero, pp, tp).tape
    cast = 0
    if plan.spec.memory.offload == "none" and BYTES[plan.grad_dtype] < max(BYTES[plan.dtype], 4):
        most = CACHED_ELEMENTS if plan.device == "cpu" else UPDATE_ELEMENTS
        cast = min(most, max(lengths) // owners) * 4
    resting = replace(resting, offload=Bytes(slots))
    moving = 0 if zero.per_microbatch else resting.communication
    return replace(
        resting,
        padding=Bytes(resting.total - slots - bare.total),
        activations=Bytes(round(tape.peak_activations)),
        peak=Bytes(round(resting.total - moving + max(tape.peak, cast))),
    )


def _state(plan: Plan, num_parameters: int, owners: int) -> MemoryRecord:
    parallel = plan.spec.parallel
    return state_memory(
        num_parameters,
        zero=parallel.zero,
        owners=owners,
        dtype=plan.dtype,
        grad_dtype=plan.grad_dtype,
        optimizer=plan.spec.train.optimizer,
        per_microbatch=parallel.zero_pipeline == "save_memory" or plan.num_microbatches == 1,
        offload=plan.spec.memory.offload,
    )


def _slots(plan: Plan, longest: int) -> int:
    """Bytes of the two slots through which offloaded state streams."""
    memory = plan.spec.memory
    if memory.offload != "state":
        return 0
    size = streamed_bytes(plan.dtype, plan.grad_dtype, plan.spec.train.optimizer)
    return 2 * size * slot_elements(parse_bytes(memory.offload_chunk), size, longest)


def _zero(plan: Plan, owners: int) -> Zero:
    parallel, topology = plan.spec.parallel, plan.topology
    return Zero(
        shards_gradients=parallel.zero >= 2 and owners > 1,
        shards_parameters=parallel.zero >= 3 and owners > 1,
        per_microbatch=parallel.zero_pipeline == "save_memory" or plan.num_microbatches == 1,
        owners=owners,
        copies=topology.dp // owners,
        element=BYTES[plan.dtype],
        grad_element=BYTES[plan.grad_dtype],
        direct=plan.device == "cpu",
    )


def _replay(plan: Plan, units: RankUnits, zero: Zero, pp: int, tp: int) -> Replay:
    s = shapes_of(plan, tp)
    last = len(plan.layers_per_stage) - 1
    stages = {}
    for stage, blocks in units.by_stage.items():
        tapes = (
            [EmbeddingTape(s, tied=units.tied is not None)] * (stage == 0)
            + _layers(plan, s, stage)
            + [HeadTape(s)] * (stage == last)
        )
        own = tuple(
            Block(tape, tuple(unit.length for unit in units)) for tape, units in zip(tapes, blocks, strict=True)
        )
        stages[stage] = StageTape(own, stage == 0, stage == last, s.hidden)
    many = plan.num_microbatches * len(plan.layers_per_stage) > _MOST_ACTIONS
    replay = Replay(stages, zero, placement_of(plan), transfers=not many)
    if plan.architecture.positions == "rotary":
        replay.tape.take(plan.sequence_length * plan.architecture.head_dim * s.element)  # cosines and sines
    schedule = computing_schedule_of(plan) if many else schedule_of(plan)
    replay.run(schedule.actions[pp])
    return replay


def _layers(plan: Plan, s: Shapes, stage: int) -> list[LayerTape]:
    """The tapes of a stage's layers, each with its own setting of recomputation."""
    settings = recompute_settings(plan, stage)
    tapes = {name: LayerTape(s, name) for name in set(settings)}
    return [tapes[setting] for setting in settings]
