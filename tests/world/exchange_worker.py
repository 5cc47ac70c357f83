"""A rank that takes its weights from a Hugging Face directory, trains, and tells what it computed and what it owns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pool import Place
from torch import Tensor

from shardwright.checkpoint.exchange.hugging_face import HuggingFaceWeights
from shardwright.layout.box import Box
from shardwright.parallel.compose import Runtime, compose
from shardwright.plan.plan import Plan
from shardwright.verify.trace import trace_layout

STEPS = 2


@dataclass
class Told:
    """What the final norm gave before and after training, [positions of the rank, sequences, hidden], or nothing on a
    rank that is not at the end of the pipeline; the boxes that the rank owns, as training left them."""

    before: Tensor | None
    after: Tensor | None
    owned: list[tuple[Box, Tensor]]


def train_from(place: Place, plan: Plan, directory: Path, tokens: Tensor) -> Told:
    """The job."""
    mesh = place.mesh(plan.topology)
    runtime = compose(plan, mesh, values=HuggingFaceWeights(directory, plan.architecture))
    before = _normed(runtime, tokens)
    trace = trace_layout(plan, mesh, STEPS, runtime)
    owned = [(part.box, part.values) for part in trace.parts if (part.step, part.kind) == (STEPS, "parameters")]
    return Told(before, _normed(runtime, tokens), owned)


def _normed(runtime: Runtime, tokens: Tensor) -> Tensor | None:
    seen: list[Tensor] = []
    norm = runtime.model.get_submodule("head.norm")
    hook = norm.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    runtime.pipeline.evaluate([(tokens, torch.full_like(tokens, -1))])
    hook.remove()
    return seen[0] if seen else None
