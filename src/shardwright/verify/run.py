"""`shardwright verify`: a layout and one device beside it, compared."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shardwright.comm.job import Job
from shardwright.comm.launch import launch
from shardwright.errors import LayoutError
from shardwright.plan.describe import layout
from shardwright.plan.machine import num_cores
from shardwright.plan.plan import Plan
from shardwright.plan.world import local_world_size
from shardwright.record.store import write_json
from shardwright.spec.load import load
from shardwright.spec.spec import Spec
from shardwright.train.prepare import plan_for
from shardwright.verify.console import print_report, print_shrunk
from shardwright.verify.proof import Proof, prove
from shardwright.verify.shrink import shrink
from shardwright.verify.trace import read_traces

_MOST_RANKS = 32


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
            backend=spec.run.backend,
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
    device = "cuda" if gpus else "cpu"
    if world_size > max(_MOST_RANKS, gpus):
        raise LayoutError(
            f"verify: {world_size} ranks are more than the {_MOST_RANKS} processes that it starts on one machine",
            "override the degrees, e.g. parallel.dp=2: smaller degrees of the same techniques prove the same code",
        )
    changes: dict[str, Any] = {"train.lr_schedule": "constant", "train.warmup_steps": 0}
    plan = _resolve(_changed(spec, changes), world_size, device)
    shrinking, said = shrink(plan)
    return (_resolve(_changed(spec, changes | shrinking), world_size, device), said) if said else (plan, [])


def gate_plan(plan: Plan) -> Plan:
    """The plan in which a layout is proven at the gate: fp64, a constant learning rate, shrunk where it is large."""
    spec = _changed(plan.spec, {"train.lr_schedule": "constant", "train.warmup_steps": 0} | shrink(plan)[0])
    return _in_dtype(_resolve(spec, plan.world_size, plan.device), "fp64")


def _resolve(spec: Spec, world_size: int, device: str) -> Plan:
    """A plan without a corpus: where the recipe alone does not tell the vocabulary, any will do."""
    return plan_for(spec, world_size, device, spec.model.vocab or spec.data.expected_vocab or 509)


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
