"""Several gloo ranks on one GPU: proof that they compute what one device computes, and what their steps take.

NCCL gives a GPU to one rank only. Over gloo the same engine, with its streams, events and residencies, runs as 4 and 8
ranks on CUDA tensors of one GPU; what NCCL itself does is not shown by it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import Section
from benchmarks.gpu.scale import Scale
from benchmarks.harness import quartiles
from benchmarks.worlds import launched
from shardwright.plan.describe import layout
from shardwright.plan.plan import Plan
from shardwright.record.store import read_json
from shardwright.verify.proof import Proof, prove
from shardwright.verify.trace import read_traces

STEPS = 3
_PROVED = {"layers": 4, "hidden": 96, "heads": 12, "kv_heads": 4, "head_dim": 8, "ffn": 203, "vocab": 509}
_TIMED = {"layers": 6, "hidden": 1024, "heads": 16, "kv_heads": 4, "ffn": 2816, "vocab": 16384}
RUN = {"run": {"backend": "gloo"}}

Parallel = dict[str, Any]


def layouts(on_gpu: bool) -> list[Parallel]:
    """1, 4 and 8 ranks with every ZeRO stage; on a CPU a few of 4."""
    two = [{"dp": 2, "tp": 2, "zero": zero} for zero in range(4)]
    if not on_gpu:
        return [{"dp": 1, "zero": 0}, two[3], {"dp": 1, "pp": 2, "tp": 2, "zero": 1}]
    lines = [{"dp": 1, "pp": 2, "tp": 2, "zero": 0}]
    lines += [{"dp": 2, "pp": 2, "zero": z, "pipeline_schedule": "zb-h1"} for z in (1, 3)]
    cubes = [{"dp": 2, "pp": 2, "tp": 2, "zero": zero} for zero in range(4)]
    cubes += [{"dp": 2, "pp": 2, "tp": 2, "zero": 3, "pipeline_schedule": "zbv", "virtual_stages": 2}]
    cubes += [{"dp": 4, "dp_shard": 2, "tp": 2, "zero": 2}, {"dp": 8, "zero": 3}]
    return [{"dp": 1, "zero": 0}, *two, *lines, *cubes]


def _name(parallel: Parallel) -> str:
    return ", ".join(f"{key} {value}" for key, value in parallel.items())


def run(scale: Scale, rounds: int, steps: int, only: list[str]) -> Section:
    """Proofs in fp64 and bf16, then steps of a larger model."""
    on_gpu = scale.device.type == "cuda"
    chosen = [p for p in layouts(on_gpu) if not only or any(part in _name(p) for part in only)]
    if not chosen:
        raise SystemExit(f"--cases: no layout holds {only}; there are: {'; '.join(map(_name, layouts(on_gpu)))}")
    proofs = prove_all([plan for p in chosen for plan in _proof_plans(scale, p)])
    speeds = time_all([_timed_plan(scale, p) for p in chosen], rounds, steps)
    heads = ["layout", "fp64 loss", "gradients", "parameters", "bf16 loss (may be)", "gradients (may be)", "verdict"]
    heads += ["ms a step", "x one rank's", "MB sent a step"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    rows = []
    for index, parallel in enumerate(chosen):
        gate, own = proofs[2 * index : 2 * index + 2]
        rows.append(_row(parallel, gate, own, speeds[index]))
        lines.append(_line(rows[-1], gate, own, speeds[index], speeds[0]))
    passed = sum(row["passed"] for row in rows)
    notes = [
        f"{passed} of {len(rows)} layouts compute what one device (this machine's CPU) computes, over {STEPS} steps",
        "all ranks share one device and talk over gloo through host memory: times are informative alone, and NCCL is "
        "not exercised here",
        "a bf16 difference may be 10 times the rounding noise of one device",
    ]
    return Section("ranks", "\n".join(lines), rows, notes)


def _proof_plans(scale: Scale, parallel: Parallel) -> list[Plan]:
    """The gate in fp64, and bf16."""
    small = replace(scale, model=_PROVED, sequence_length=13, micro_batch_size=1)
    plans = []
    for dtype, grad_dtype in (("fp64", "fp64"), ("bf16", "fp32")):
        train = {"dtype": dtype, "grad_dtype": grad_dtype, "lr_schedule": "constant", "warmup_steps": 0}
        batch = {"global_batch_size": 16 if scale.device.type == "cuda" else 4}  # the same for every layout
        plans.append(small.plan(dp=parallel["dp"], parallel=parallel, train=train | batch, **RUN))
    return plans


def _timed_plan(scale: Scale, parallel: Parallel) -> Plan:
    """As many sequences a step in every layout, in microbatches of 2."""
    batch = 16 if scale.device.type == "cuda" else 8
    if scale.device.type == "cuda":
        scale = replace(scale, model=_TIMED, sequence_length=512)
    scale = replace(scale, micro_batch_size=2)
    return scale.plan(dp=parallel["dp"], parallel=parallel, train={"global_batch_size": batch}, **RUN)


def prove_all(plans: Sequence[Plan]) -> list[Proof]:
    """Each plan beside one device."""
    with tempfile.TemporaryDirectory() as folder:
        folders = launched(plans, "shardwright.verify.rank", (str(STEPS),), Path(folder), backend="gloo")
        traces = [read_traces(path, plan.world_size) for plan, path in zip(plans, folders, strict=True)]
    return [prove(plan, trace, STEPS) for plan, trace in zip(plans, traces, strict=True)]


def time_all(plans: Sequence[Plan], rounds: int, steps: int) -> list[dict[str, Any]]:
    """Seconds of steps of each plan; those of one world take turns."""
    with tempfile.TemporaryDirectory() as folder:
        folders = launched(plans, "benchmarks.gpu.rank", (str(rounds), str(steps)), Path(folder), backend="gloo")
        return [read_json(path / "speed.json") for path in folders]


def _row(parallel: Parallel, gate: Proof, own: Proof, speed: dict[str, Any]) -> dict[str, Any]:
    return {
        "parallel": parallel,
        "layout": layout(gate.plan),
        "passed": gate.passed and own.passed,
        "fp64": gate.as_json(),
        "bf16": own.as_json(),
        **speed,
    }


def _line(row: dict[str, Any], gate: Proof, own: Proof, speed: dict[str, Any], first: dict[str, Any]) -> str:
    low, middle, high = quartiles(speed["seconds"])
    errors = gate.comparison.errors()
    cells = [_name(row["parallel"]), *(f"{errors[kind] or 0.0:.0e}" for kind in errors)]
    found = own.comparison.errors()
    cells += [f"{found[kind] or 0.0:.1e} ({own.bars[kind]:.1e})" for kind in ("loss", "gradients")]
    cells += ["ok" if row["passed"] else "**differs**"]
    cells += [f"{middle * 1e3:.0f} ({low * 1e3:.0f} to {high * 1e3:.0f})"]
    cells += [f"{middle / quartiles(first['seconds'])[1]:.2f}", f"{speed['sent_bytes'] / 1e6:.1f}"]
    return "| " + " | ".join(cells) + " |"
