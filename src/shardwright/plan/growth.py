"""How large a technique lets a model become, and how well it then scales, planned for a named device.

Note: the rules. The recipe's architecture grows in width and depth together: hidden, heads and ffn k times, layers k
times, with the size of a head, the vocabulary, the sequence and the microbatch as they are; at the largest k that fits,
layers are added until nothing more does. Parameters are bf16 with fp32 masters, as GPUs train. A data rank has sixteen
microbatches in a step, or four for each stage of a pipeline where that is more. Beyond a node `tp` and beyond 16 stages
`pp` go no further: the other ranks are data parallel. The efficiency is the time of the model's FLOPs at the device's
peak, divided by the same over what the bubble leaves and the time of the bytes that the busiest rank sends, at the rate
of the link, or of the network where the axis crosses nodes. Nothing is taken to overlap: it is a lower bound, to
compare techniques with, and no prediction of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

from shardwright.cost.hardware import Hardware
from shardwright.errors import ShardwrightError
from shardwright.layout.mesh import Coordinate
from shardwright.plan.communication import busiest_rank, estimated_communication, shares
from shardwright.plan.fit import with_fields
from shardwright.plan.flops import flops_of
from shardwright.plan.memory import estimated_memory
from shardwright.plan.pipeline import totals_of
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.plan.techniques import Technique
from shardwright.spec.architecture import Architecture
from shardwright.spec.spec import Spec
from shardwright.units import Bytes, Seconds

_MOST_STAGES = 16
_MICROBATCHES, _MICROBATCHES_OF_A_STAGE = 16, 4
_WIDEST = 512


@dataclass(frozen=True)
class Grown:
    """The largest model that fits on a number of ranks: its parameters, shape, and planned efficiency there."""

    world: int
    parameters: int
    layers: int
    hidden: int
    efficiency: float


def largest(
    technique: Technique, spec: Spec, model: Architecture, world: int, hardware: Hardware, usable: Bytes
) -> Grown | str:
    """The largest model of a technique within `usable` bytes a rank; else why there is none."""
    try:
        applied = technique.applied(spec, _own_ranks(technique, world, hardware))
    except ShardwrightError as error:
        return error.problem
    step = applied.parallel.tp // gcd(applied.parallel.tp, model.heads)

    def made(width: int, layers: int) -> Plan | None:
        """The plan, None where it does not fit."""
        plan = _plan(_grown(applied, model, width, layers), world if not technique.single else 1, hardware)
        return plan if _peak(plan) <= usable else None

    smallest = -(-_stages(applied) // model.layers)
    try:
        width = step * _most(lambda count: made(step * count, _layers(model, step * count, smallest)), _WIDEST // step)
        if not width:
            return f"the smallest, {step} times as wide as the recipe's, does not fit"
        least = _layers(model, width, smallest)
        unit = _stages(applied)
        more = _most(lambda count: made(width, least + count * unit), 4 * least // unit)
        found = made(width, least + more * unit)
    except ShardwrightError as error:
        return error.problem
    assert found is not None, "it fitted before"
    return _told(found, hardware)


def _own_ranks(technique: Technique, world: int, hardware: Hardware) -> int:
    """Ranks that the technique itself takes; the others are data parallel."""
    most = {"tp": hardware.gpus_per_node, "pp": _MOST_STAGES}
    return min(world, most.get(technique.axis, world))


def _stages(spec: Spec) -> int:
    virtual = 2 if spec.parallel.pipeline_schedule == "zbv" else spec.parallel.virtual_stages
    return spec.parallel.pp * virtual


def _layers(model: Architecture, width: int, smallest: int) -> int:
    return model.layers * max(width, smallest)


def _grown(spec: Spec, a: Architecture, width: int, layers: int) -> Spec:
    """The recipe with the architecture written out, `width` times as wide."""
    fields = {name: getattr(a, name) for name in type(a).model_fields if name in type(spec.model).model_fields}
    fields |= {
        "hidden": a.hidden * width,
        "heads": a.heads * width,
        "kv_heads": a.kv_heads * width,
        "ffn": a.ffn * width,
        "layers": layers,
    }
    return spec.model_copy(update={"model": type(spec.model)(**fields)})


def _plan(spec: Spec, world: int, hardware: Hardware) -> Plan:
    parallel = spec.parallel
    dp = world // (parallel.tp * parallel.pp)
    microbatches = max(_MICROBATCHES, _MICROBATCHES_OF_A_STAGE * parallel.pp)
    batch = dp * microbatches * spec.train.micro_batch_size
    changed = with_fields(spec, {"parallel.dp": dp, "train.global_batch_size": batch, "train.dtype": "bf16"})
    changed = with_fields(changed, {"train.grad_dtype": "fp32", "run.device": "cuda", "run.compile": False})
    node = min(hardware.gpus_per_node, world)
    return resolve(
        changed, world_size=world, device="cuda", native_bf16=True, tokenizer_vocab=spec.model.vocab, local_size=node
    )


def _peak(plan: Plan) -> Bytes:
    """Of the fullest rank: the first stages keep most microbatches, the last has the logits."""
    last = plan.topology.pp - 1
    places = {0, min(1, last), last // 2, last}
    return max(estimated_memory(plan, plan.topology.rank(Coordinate(pp=pp))).peak for pp in places)


def _most(fits: Callable[[int], Plan | None], limit: int) -> int:
    """The largest count up to `limit` that fits, 0 for none; what is larger than one that does not fit does not."""
    low, high = 0, 1
    while high <= limit and fits(high) is not None:
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle) is not None:
            low = middle
        else:
            high = middle
    return low


def _told(plan: Plan, hardware: Hardware) -> Grown:
    a, seconds = plan.architecture, _sending(plan, hardware)
    computing = flops_of(plan).hardware_per_device / hardware.peak_bf16
    whole = computing / (1 - totals_of(plan).bubble) + seconds
    return Grown(plan.world_size, a.num_parameters, a.layers, a.hidden, computing / whole)


def _sending(plan: Plan, hardware: Hardware) -> Seconds:
    """The time of all bytes of the busiest rank."""
    records = estimated_communication(plan, busiest_rank(plan))
    slow = hardware.network or hardware.link
    rows = shares(records, plan.topology, hardware.gpus_per_node)
    return Seconds(sum(row.sent / (slow if row.crosses_nodes else hardware.link) for row in rows))
