"""A plan in a few lines, for people."""

from __future__ import annotations

from shardwright.cost.memory import saved_bytes
from shardwright.plan.host import most_host_memory
from shardwright.plan.pipeline import totals_of
from shardwright.plan.plan import Plan
from shardwright.plan.stages import MOST_STAGES_SHOWN
from shardwright.units import format_bytes, format_count

_ZERO = {
    0: "0: everything whole",
    1: "1: optimizer state sharded",
    2: "2: optimizer state and gradients sharded",
    3: "3: optimizer state, gradients and parameters sharded",
}

_FEW_STAGES = 4  # shown one by one even where all are alike


def describe(plan: Plan) -> list[tuple[str, str]]:
    """(label, value) lines: model, layout, batch, precision, ZeRO, decisions, warnings."""
    model, mesh, train = plan.architecture, plan.topology, plan.spec.train
    zero = plan.spec.parallel.zero
    shards = f" over {mesh.shard} ranks" if zero and mesh.shard > 1 else ""
    lines = [
        (
            "model",
            f"{format_count(model.num_parameters)} parameters: {model.layers} layers, hidden {model.hidden}, "
            f"{model.heads} heads ({model.kv_heads} kv), ffn {model.ffn}, vocab {model.vocab}",
        ),
        ("layout", f"{layout(plan)} on {plan.device}"),
        (
            "batch",
            f"{train.global_batch_size} sequences of {plan.sequence_length} tokens = "
            f"{format_count(plan.tokens_per_step)} tokens; {_microbatches(plan)} of "
            f"{train.micro_batch_size} on each data rank",
        ),
        ("precision", f"{plan.dtype}, gradients {plan.grad_dtype}"),
        ("zero", _ZERO[zero] + shards),
        ("train", f"{train.steps} steps of {train.optimizer}, lr {train.lr:g} {train.lr_schedule}"),
    ]
    if plan.spec.checkpoint.every:
        lines.append(("saves", saves(plan)))
    if plan.spec.memory.offload != "none":
        lines.insert(5, ("offload", offload(plan)))
    if plan.spec.memory.recompute != "none":
        lines.insert(5, ("recompute", recompute(plan)))
    if plan.topology.pp > 1:
        lines.insert(2, ("pipeline", pipeline(plan)))
    lines += [("decided", decision) for decision in plan.decisions]
    return lines + [("warning", warning) for warning in plan.warnings]


def layout(plan: Plan) -> str:
    """The degrees in words: "4 ranks: dp 4 (replicate 2 x shard 2) x pp 1 x tp 1"."""
    mesh = plan.topology
    ranks = "1 rank" if plan.world_size == 1 else f"{plan.world_size} ranks"
    return f"{ranks}: dp {mesh.dp} (replicate {mesh.replicate} x shard {mesh.shard}) x pp {mesh.pp} x tp {mesh.tp}"


def saves(plan: Plan) -> str:
    """How often, how large, and what it takes of the hosts' memory."""
    every, keep = plan.spec.checkpoint.every, plan.spec.checkpoint.keep
    size = format_bytes(plan.architecture.num_parameters * saved_bytes(plan.dtype, plan.spec.train.optimizer))
    return (
        f"every {every} steps, {size} each, the newest {keep} kept; ranks keep as much host memory, shared among them"
    )


def offload(plan: Plan) -> str:
    """What lives on the host, in words: "update: optimizer state lives on the host and is updated there; at
    most 12.5 MiB for a rank"."""
    form = plan.spec.memory.offload
    what = {"state": "streams through the device to be updated", "update": "is updated there"}[form]
    accounted = "; on a CPU both are one memory, accounted apart" if plan.device == "cpu" else ""
    return (
        f"{form}: optimizer state lives on the host and {what}; at most "
        f"{format_bytes(most_host_memory(plan))} for a rank{accounted}"
    )


def recompute(plan: Plan) -> str:
    """What is computed again, in words: "full, in 12 of 24 layers: a layer keeps its input alone"."""
    memory, layers = plan.spec.memory, plan.architecture.layers
    chosen = layers if isinstance(memory.recompute_layers, str) else len(memory.recompute_layers)
    keeps = {"full": "its input alone", "selective": "what its products and its attention give"}[memory.recompute]
    which = "in every layer" if chosen == layers else f"in {chosen} of {layers} layers"
    return f"{memory.recompute}, {which}: a layer keeps {keeps}"


def pipeline(plan: Plan) -> str:
    """The pipeline in words: "1f1b over 2 stages of 5 + 3 layers, 8 microbatches: bubble 11 % estimated"."""
    pp, count = plan.topology.pp, len(plan.layers_per_stage)
    over = f"{count} stages" if plan.virtual_stages == 1 else f"{pp} ranks x {plan.virtual_stages} stages"
    summed_up = count > MOST_STAGES_SHOWN or (count > _FEW_STAGES and len(set(plan.layers_per_stage)) == 1)
    layers = _between(plan.layers_per_stage) if summed_up else " + ".join(map(str, plan.layers_per_stage))
    plural = "" if layers == "1" else "s"
    bubble = f"bubble {totals_of(plan).bubble:.0%} estimated".replace("%", " %")
    return (
        f"{plan.spec.parallel.pipeline_schedule} over {over} of {layers} layer{plural}, {_microbatches(plan)}: {bubble}"
    )


def _between(counts: tuple[int, ...]) -> str:
    """The least and the most layers of a stage: "7 to 8"."""
    least, most = min(counts), max(counts)
    return str(least) if least == most else f"{least} to {most}"


def _microbatches(plan: Plan) -> str:
    return "1 microbatch" if plan.num_microbatches == 1 else f"{plan.num_microbatches} microbatches"
