"""What recomputation and offload cost in time and save in memory, on one model that fits without either."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.gpu.race import Contender, Race, Result, Training, table
from benchmarks.gpu.record import Section, rows_of
from benchmarks.gpu.scale import Engine, Scale
from benchmarks.harness import quartiles
from shardwright.cost.memory import BYTES
from shardwright.plan.plan import Plan
from shardwright.train.ledger import measured_memory

FORMS = ("none", "state", "update")


def _engine(scale: Scale, memory: dict[str, Any], facts: dict[str, Any]) -> Training:
    engine = Engine.of(scale.plan(memory=memory), scale.device)
    record = measured_memory(engine.runtime, engine.optimizer, transient=False)
    facts["host_bytes"] = int(record.host)
    return Training(engine.step, engine.settle)


def _race(scale: Scale, field: str, values: tuple[str, ...], rounds: int, steps: int) -> tuple[list[Result], Plan]:
    """Each value of a field of [memory]; made anew for every turn, so that each has the device for itself."""
    facts: dict[str, dict[str, Any]] = {value: {} for value in values}
    peer = f"{field} = {values[0]}"
    contenders = [
        Contender(f"{field} = {value}", partial(_engine, scale, {field: value}, facts[value]), "" if not i else peer)
        for i, value in enumerate(values)
    ]
    results = Race(contenders, scale.device, keep=False).run(rounds, steps)
    for value, result in zip(values, results, strict=True):
        result.facts |= facts[value]
    return results, scale.plan()


def recompute(scale: Scale, rounds: int, steps: int) -> Section:
    """memory.recompute = none, selective, full."""
    results, plan = _race(scale, "recompute", ("none", "selective", "full"), rounds, steps)
    text = table(results, plan, scale.tokens_per_step, scale.device)
    notes = [_model(plan, scale), "MFU counts no recomputation: what is computed twice lowers it"]
    return Section("recompute", text, rows_of(results), notes)


def offload(scale: Scale, rounds: int, steps: int) -> Section:
    """memory.offload = none, state, update on a model of half the layers."""
    scale = replace(scale, model=scale.model | {"layers": max(1, scale.model["layers"] // 2)})
    results, plan = _race(scale, "offload", FORMS, rounds, steps)
    base = quartiles(results[0].seconds)[1] if results[0].seconds else None
    for form, result in zip(FORMS, results, strict=True):
        result.facts["transfer_bytes"] = transfer_bytes(plan, form)
        if result.seconds and form != "none":
            middle = quartiles(result.seconds)[1]
            result.facts["GB/s, step"] = result.facts["transfer_bytes"] / middle / 1e9
            exposed = middle - base if base is not None else 0.0
            result.facts["ms exposed"] = 1e3 * exposed
        result.facts["host, GB"] = result.facts.get("host_bytes", 0) / 1e9
        result.facts["moved, GB"] = result.facts["transfer_bytes"] / 1e9
    shown = ["host, GB", "moved, GB", "GB/s, step", "ms exposed"]
    text = table(results, plan, scale.tokens_per_step, scale.device, shown)
    notes = [
        _model(plan, scale),
        "moved: bytes a step between host and device by formula, both ways: state, masters and two moments in and out; "
        "update, gradients out and parameters back. GB/s is over the whole step, exposed what it is longer than none's",
    ]
    if scale.device.type == "cpu":
        notes.append("on a CPU both sides are the same memory: times say nothing of transfers")
    return Section("offload", text, rows_of(results), notes)


def transfer_bytes(plan: Plan, form: str) -> int:
    """Bytes that one rank, which owns everything, moves in a step under AdamW, both ways together."""
    count = plan.architecture.num_parameters
    if form == "state":
        return count * 2 * 3 * BYTES["fp32"]
    if form == "update":
        return count * (BYTES[plan.grad_dtype] + BYTES[plan.dtype])
    return 0


def _model(plan: Plan, scale: Scale) -> str:
    a = plan.architecture
    return (
        f"{a.num_parameters / 1e9:.3f} B parameters in {a.layers} layers; {scale.microbatches} microbatches of "
        f"{scale.micro_batch_size} x {scale.sequence_length} tokens, {plan.dtype}, gradients {plan.grad_dtype}; each "
        "case is made anew for each of its turns"
    )
