"""Layouts of a model whose sizes divide by nothing, traced on the pool and compared with one device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pool import Place, Pool

from shardwright.parallel.compose import Runtime, compose
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.spec.load import build
from shardwright.verify.compare import BARS, KINDS, Comparison, compare
from shardwright.verify.reference import trace_one_device
from shardwright.verify.trace import read_traces, trace_layout, write_trace

STEPS = 2
# Nothing divides: 509 words, 27 features, 13 positions.
LLAMA = {"layers": 2, "hidden": 24, "heads": 12, "head_dim": 4, "ffn": 27, "vocab": 509}
QWEN = LLAMA | {"head_dim": 6, "qk_norm": True, "qkv_bias": True}
QWEN2 = LLAMA | {"qkv_bias": True}
GPT2 = LLAMA | {"norm": "layernorm", "activation": "gelu", "positions": "learned", "bias": True}


def plan_of(
    model: dict[str, Any], parallel: dict[str, Any], memory: dict[str, Any] | None = None, **train: Any
) -> Plan:
    """A plan in fp64 on dp x tp x pp ranks, clipped to a norm that bites."""
    recipe = {
        "sequence_length": 13,
        "global_batch_size": 12,
        "micro_batch_size": 2,
        "dtype": "fp64",
        "lr": 1e-2,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0.05,
    }
    spec = build({"model": model, "train": recipe | train, "parallel": parallel, "memory": memory or {}})
    return resolve(spec, world_size=None, device="cpu", native_bf16=True, tokenizer_vocab=None)


Fault = Callable[[Runtime, pytest.MonkeyPatch], None]


def write(place: Place, plan: Plan, folder: Path, fault: Fault | None = None) -> None:
    """In a rank: trace a plan, broken by `fault`, and write what the rank owns."""
    mesh = place.mesh(plan.topology)
    runtime = compose(plan, mesh)
    with pytest.MonkeyPatch.context() as patch:
        if fault is not None:
            fault(runtime, patch)
        write_trace(folder, mesh.rank, trace_layout(plan, mesh, STEPS, runtime))


def compared(pool: Pool, plan: Plan, folder: Path, fault: Fault | None = None) -> Comparison:
    pool.run(plan.world_size, write, plan, folder, fault)
    bars = {kind: BARS[plan.dtype] for kind in KINDS}
    return compare(read_traces(folder, plan.world_size), trace_one_device(plan, STEPS), plan, STEPS, bars)
