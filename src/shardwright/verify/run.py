"""`shardwright verify`: a layout and one device beside it, compared."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardwright.comm.job import Job
from shardwright.comm.launch import launch
from shardwright.comm.machine import computes_bf16
from shardwright.errors import LayoutError
from shardwright.nn.dtypes import torch_dtype
from shardwright.plan.describe import layout
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.plan.world import local_world_size
from shardwright.record.store import write_json
from shardwright.spec.load import load
from shardwright.spec.spec import Spec
from shardwright.train.prepare import num_cores
from shardwright.verify.compare import BARS, KINDS, NOISE_FACTOR, Comparison, as_json, compare
from shardwright.verify.console import print_report, print_shrunk
from shardwright.verify.reference import trace_one_device
from shardwright.verify.shrink import shrink
from shardwright.verify.trace import Trace, read_traces

_MOST_RANKS = 32


@dataclass(frozen=True)
class Proof:
    """One precision's comparison. `noise` is by kind; `bars` are what the errors had to stay under."""

    plan: Plan
    steps: int
    comparison: Comparison
    noise: dict[str, float]
    bars: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether every kind is under its bar and every element has an owner."""
        errors = self.comparison.errors()
        under = all(error is None or error <= self.bars[kind] for kind, error in errors.items())
        return under and self.comparison.missing is None

    def as_json(self) -> dict[str, Any]:
        """The document of one precision."""
        errors = self.comparison.errors()
        return {
            "passed": self.passed,
            "dtype": self.plan.dtype,
            "optimizer": self.plan.spec.train.optimizer,
            "steps": self.steps,
            **{kind: {"max_error": errors[kind], "bar": self.bars[kind], "noise": self.noise[kind]} for kind in KINDS},
            "noise": max(self.noise.values()),
            "bar": max(self.bars.values()),
            "missing": self.comparison.missing,
            "first_difference": as_json(self.comparison.first_difference),
        }


def verify(recipe: str, overrides: Sequence[str] = (), steps: int = 3, json_output: bool = False) -> int:
    """Prove a recipe's layout on this machine's processes; the exit code is 1 where it differs from one device.

    fp64 is the gate. A recipe in another precision is compared in its own as well, beside the rounding noise. Raises
    ShardwrightError for what can be refused before ranks start.
    """
    spec = load(recipe, overrides)
    plan, shrunk = _plan_for_proof(spec)
    if not json_output:
        print_shrunk(plan, shrunk)
    plans = [plan] if plan.dtype == "fp64" else [_in_dtype(plan, "fp64"), plan]
    with tempfile.TemporaryDirectory(prefix="shardwright-verify-") as folder:
        folders = [Path(folder) / p.dtype for p in plans]
        for own, path in zip(plans, folders, strict=True):
            path.mkdir()
            write_json(path / "plan.json", own.model_dump(mode="json"))
        job = Job(
            world_size=plan.world_size,
            entry="shardwright.verify.rank",
            arguments=(str(steps), *map(str, folders)),
            device=plan.device,
            collective_timeout=spec.run.collective_timeout_seconds,
        )
        if code := launch(job):
            return code
        traces = [read_traces(path, plan.world_size) for path in folders]
    proofs = [prove(own, trace, steps) for own, trace in zip(plans, traces, strict=True)]
    passed = all(proof.passed for proof in proofs)
    if json_output:
        json.dump(_document(plan, proofs, shrunk), sys.stdout, indent=2)
        print()
    else:
        print_report(plan, proofs)
    return 0 if passed else 1


def prove(plan: Plan, traces: list[Trace], steps: int) -> Proof:
    """Compare traces of all ranks with one device's, computed here twice: in order, and in another order for the noise.

    The one device is this machine's CPU, whatever the ranks ran on.
    """
    reference = trace_one_device(plan, steps)
    other = trace_one_device(plan, steps, backwards=True)
    limitless = dict.fromkeys(KINDS, float("inf"))
    noise = {kind: error or 0.0 for kind, error in compare([other], reference, plan, steps, limitless).errors().items()}
    if plan.dtype in BARS:
        bars = dict.fromkeys(KINDS, BARS[plan.dtype])
    else:
        # Where there is next to no noise to measure (one sequence, say), a rounding of the dtype itself is allowed.
        floor = torch.finfo(torch_dtype(plan.dtype)).eps / NOISE_FACTOR
        bars = {kind: NOISE_FACTOR * max(noise[kind], floor / NOISE_FACTOR) for kind in KINDS}
    return Proof(plan, steps, compare(traces, reference, plan, steps, bars), noise, bars)


def _document(plan: Plan, proofs: list[Proof], shrunk: list[str]) -> dict[str, Any]:
    """The recipe's own precision at the top; the fp64 gate beside it where that is another one."""
    own = proofs[-1].as_json()
    gate = None if len(proofs) == 1 else proofs[0].as_json()
    passed = all(proof.passed for proof in proofs)
    return {**own, "passed": passed, "layout": layout(plan), "shrunk": shrunk, "gate": gate}


def _plan_for_proof(spec: Spec) -> tuple[Plan, list[str]]:
    """The plan to prove: the recipe's, on a constant learning rate and shrunk where it is large."""
    gpus = torch.cuda.device_count() if spec.run.device != "cpu" else 0
    world_size = local_world_size(spec, cores=num_cores(), gpus=gpus)
    device = "cuda" if gpus >= world_size else "cpu"
    if world_size > _MOST_RANKS and device == "cpu":
        raise LayoutError(
            f"verify: {world_size} ranks are more than the {_MOST_RANKS} processes that it starts on one machine",
            "override the degrees, e.g. parallel.dp=2: smaller degrees of the same techniques prove the same code",
        )
    changes: dict[str, Any] = {"train.lr_schedule": "constant", "train.warmup_steps": 0}
    plan = _resolve(_changed(spec, changes), world_size, device)
    shrinking, said = shrink(plan)
    return (_resolve(_changed(spec, changes | shrinking), world_size, device), said) if said else (plan, [])


def _resolve(spec: Spec, world_size: int, device: str) -> Plan:
    own = "cuda" if device == "cuda" else "cpu"
    return resolve(
        spec,
        world_size=world_size,
        device=own,
        native_bf16=computes_bf16(own),
        tokenizer_vocab=spec.model.vocab or spec.data.expected_vocab or 509,
    )


def _in_dtype(plan: Plan, dtype: str) -> Plan:
    spec = _changed(plan.spec, {"train.dtype": dtype, "train.grad_dtype": "fp64" if dtype == "fp64" else "fp32"})
    return _resolve(spec, plan.world_size, plan.device)


def _changed(spec: Spec, changes: dict[str, Any]) -> Spec:
    """A recipe with some dotted fields replaced."""
    tables = spec.model_dump()
    for name, value in changes.items():
        section, _, key = name.partition(".")
        tables[section][key] = value
    return Spec.model_validate(tables)
