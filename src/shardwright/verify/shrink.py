"""A proof needs the layout, not the size: a large model is made small while everything that is laid out stays."""

from __future__ import annotations

from typing import Any

from shardwright.plan.plan import Plan

_SEQUENCE, _VOCAB, _HEAD_DIM, _FFN = 64, 509, 16, 96
_SMALL = 6_000_000
"""Parameters x tokens of a step / 1000 under which nothing is shrunk."""


def shrink(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """Recipe fields to change so that a proof takes seconds, and what was changed in words.

    Kept are dp, pp, tp, ZeRO, the schedule, microbatches up to 3 a rank or one more than pp, norms, biases, tying, the
    ratio of query to KV heads, every layer that a stage needs, and which of given stages have more than one.
    """
    a, train = plan.architecture, plan.spec.train
    if a.num_parameters / 1000 * plan.tokens_per_step <= _SMALL:
        return {}, []
    per_kv = a.heads // a.kv_heads
    kv_heads = min(a.kv_heads, max(plan.topology.tp, 2))
    heads = kv_heads * per_kv
    head_dim = min(a.head_dim, _HEAD_DIM)
    sequence = min(plan.sequence_length, _SEQUENCE)
    micro = min(train.micro_batch_size, 2)
    given = plan.spec.parallel.stages
    stages = given if given == "auto" else tuple(min(layers, 2) for layers in given)
    changes: dict[str, Any] = {
        "model.layers": min(a.layers, max(2, len(plan.layers_per_stage))) if stages == "auto" else sum(stages),
        "parallel.stages": stages,
        "model.heads": heads,
        "model.kv_heads": kv_heads,
        "model.head_dim": head_dim,
        "model.hidden": min(a.hidden, heads * head_dim, 128),
        "model.ffn": min(a.ffn, _FFN),
        "model.vocab": min(a.vocab, _VOCAB),
        "model.max_positions": min(a.max_positions, sequence) if a.positions == "learned" else a.max_positions,
        "train.sequence_length": sequence,
        "train.micro_batch_size": micro,
        "train.global_batch_size": plan.topology.dp * micro * min(plan.num_microbatches, max(3, plan.topology.pp + 1)),
    }
    was = {
        **{f"model.{name}": getattr(a, name) for name in type(a).model_fields},
        "parallel.stages": given,
        "train.sequence_length": plan.sequence_length,
        "train.micro_batch_size": train.micro_batch_size,
        "train.global_batch_size": train.global_batch_size,
    }
    changes = {name: value for name, value in changes.items() if was[name] != value}
    return changes, [f"{name} {was[name]} -> {value}" for name, value in changes.items()]
