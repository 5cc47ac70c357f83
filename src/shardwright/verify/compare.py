"""Note: what "equal" means.

The error of a tensor is max|a - b| / max(max|b|, r): b is the one-device tensor and r the root mean square over all
tensors of its kind in that step. The floor r is there because some true gradients are zero (a key's bias under softmax)
and only rounding is left of them; a relative error element by element means nothing there. Adam turns such noise into
moves of the size of the learning rate, so below fp64 only what does not depend on that is compared under AdamW: every
loss, and the first step's gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from shardwright.plan.plan import Plan
from shardwright.verify.trace import Part, Trace

KINDS: tuple[str, ...] = ("loss", "gradients", "parameters")
BARS = {"fp64": 1e-10, "fp32": 5e-6}
NOISE_FACTOR = 10.0
"""In a recipe's own precision, how many times the rounding noise a difference may be."""


@dataclass(frozen=True)
class Difference:
    """The first tensor that differs by more than its bar, and the element that differs most."""

    step: int
    kind: str
    name: str
    box: str
    owner: int
    element: tuple[int, ...]
    value: float
    expected: float
    error: float


@dataclass(frozen=True)
class Comparison:
    """The largest error of each kind over what is compared; None where a kind is not."""

    loss: float
    gradients: float
    parameters: float | None
    first_difference: Difference | None
    missing: str | None

    def errors(self) -> dict[str, float | None]:
        """By kind."""
        return {"loss": self.loss, "gradients": self.gradients, "parameters": self.parameters}


def compared_steps(plan: Plan, steps: int) -> dict[str, range]:
    """Which steps of each kind are compared, counted from 1."""
    exact = plan.dtype == "fp64" or plan.spec.train.optimizer == "sgd"
    everything = range(1, steps + 1)
    if plan.dtype == "bf16":
        # Masters move by rounded gradients whatever the optimizer is: later steps compare noise with noise.
        return {"loss": everything, "gradients": range(1, 2), "parameters": range(0)}
    return {
        "loss": everything,
        "gradients": everything if exact else range(1, 2),
        "parameters": everything if exact else range(0),
    }


def _whole(trace: Trace, kind: str, step: int) -> dict[str, Tensor]:
    return {p.box.name: p.values.double() for p in trace.parts if p.kind == kind and p.step == step}


def _floor(tensors: Iterable[Tensor]) -> float:
    squares, count = 0.0, 0
    for tensor in tensors:
        squares += float(tensor.square().sum())
        count += tensor.numel()
    return math.sqrt(squares / max(count, 1))


class _Scales:
    """max(max|b|, r) of every one-device tensor of one kind and step."""

    def __init__(self, reference: dict[str, Tensor]) -> None:
        floor = _floor(reference.values())
        tiny = torch.finfo(torch.float64).tiny
        self._scale = {name: max(float(t.abs().max()), floor, tiny) for name, t in reference.items()}

    def __getitem__(self, name: str) -> float:
        return self._scale[name]


def _difference(part: Part, expected: Tensor, scale: float) -> Difference:
    gap = (part.values.double() - expected).abs()
    worst = int(torch.where(gap.isnan(), torch.inf, gap).argmax())
    element = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), gap.shape))
    place = tuple(o + i for o, i in zip(part.box.offset, element, strict=True))
    value, want = float(part.values.flatten()[worst]), float(expected.flatten()[worst])
    error = abs(value - want) / scale
    error = math.inf if math.isnan(error) else error
    return Difference(part.step, part.kind, part.box.name, str(part.box), part.rank, place, value, want, error)


def _compare_kind(
    traces: list[Trace], reference: Trace, kind: str, step: int, bar: float
) -> tuple[float, Difference | None, str | None]:
    whole = _whole(reference, kind, step)
    scales = _Scales(whole)
    order = {name: i for i, name in enumerate(whole)}
    covered = {name: torch.zeros(t.shape, dtype=torch.bool) for name, t in whole.items()}
    worst, first = 0.0, None
    for part in (p for t in traces for p in t.parts if p.kind == kind and p.step == step):
        if part.box.name not in whole:
            return math.inf, first, f"{part.box.name} exists on rank {part.rank} and not on one device"
        covered[part.box.name][part.box.slices()] = True
        found = _difference(part, whole[part.box.name][part.box.slices()], scales[part.box.name])
        worst = max(worst, found.error)
        if found.error > bar and (first is None or order[found.name] < order[first.name]):
            first = found
    absent = next((name for name, mask in covered.items() if not mask.all()), None)
    missing = None if absent is None else f"{kind} of {absent}: some elements have no owner"
    return (math.inf if missing else worst), first, missing


def _loss_error(value: float, expected: float) -> float:
    error = abs(value - expected) / max(abs(expected), torch.finfo(torch.float64).tiny)
    return math.inf if math.isnan(error) else error


def compare(traces: list[Trace], reference: Trace, plan: Plan, steps: int, bars: dict[str, float]) -> Comparison:
    """Every rank's losses and owned boxes against the one device's; `bars` by kind."""
    ranges = compared_steps(plan, steps)
    errors: dict[str, float] = {"loss": 0.0, "gradients": 0.0, "parameters": 0.0}
    first: Difference | None = None
    missing: str | None = None
    for step in range(1, steps + 1):
        for rank, trace in enumerate(traces):
            value, want = trace.losses[step - 1], reference.losses[step - 1]
            error = _loss_error(value, want)
            errors["loss"] = max(errors["loss"], error)
            if error > bars["loss"] and first is None:
                first = Difference(step, "loss", "loss", "loss", rank, (), value, want, error)
        for kind in ("gradients", "parameters"):
            if step not in ranges[kind]:
                continue
            error, found, absent = _compare_kind(traces, reference, kind, step, bars[kind])
            errors[kind] = max(errors[kind], error)
            # A tensor says more than the loss that it changed.
            if found is not None and (first is None or (first.kind == "loss" and first.step == found.step)):
                first = found
            missing = missing or absent
    compares_parameters = len(ranges["parameters"]) > 0
    parameters = errors["parameters"] if compares_parameters else None
    return Comparison(errors["loss"], errors["gradients"], parameters, first, missing)


def as_json(difference: Difference | None) -> dict[str, Any] | None:
    """A difference as a JSON object."""
    return None if difference is None else {**asdict(difference), "element": list(difference.element)}
