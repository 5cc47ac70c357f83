"""One precision's verdict: errors, the bars they must stay under, and the rounding noise beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from shardwright.nn.dtypes import torch_dtype
from shardwright.plan.plan import Plan
from shardwright.verify.compare import BARS, KINDS, NOISE_FACTOR, Comparison, as_json, compare
from shardwright.verify.reference import trace_one_device
from shardwright.verify.trace import Trace


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


def prove(plan: Plan, traces: list[Trace], steps: int) -> Proof:
    """Compare traces of all ranks with one device's, computed here twice: in order, and in another order for the noise.

    The one device is this machine's CPU, whatever the ranks ran on.
    """
    reference = trace_one_device(plan, steps)
    other = trace_one_device(plan, steps, backwards=True)
    limitless = {kind: float("inf") for kind in KINDS}
    noise = {kind: error or 0.0 for kind, error in compare([other], reference, plan, steps, limitless).errors().items()}
    if plan.dtype in BARS:
        bars = {kind: BARS[plan.dtype] for kind in KINDS}
    else:
        # Where there is next to no noise to measure (one sequence, say), a rounding of the dtype itself is allowed.
        floor = torch.finfo(torch_dtype(plan.dtype)).eps / NOISE_FACTOR
        bars = {kind: NOISE_FACTOR * max(noise[kind], floor / NOISE_FACTOR) for kind in KINDS}
    return Proof(plan, steps, compare(traces, reference, plan, steps, bars), noise, bars)
