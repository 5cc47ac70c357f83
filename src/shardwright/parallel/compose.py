"""The one page that puts the techniques together, in order, with the reason for the order.

1. The model is built as one device would write it, without memory: nothing whole exists anywhere.
2. Units take its parameters, block by block, into flat buffers owned as the ZeRO stage says. This comes last among the
   things that change modules, because a unit's buffer holds whatever parameters a rank is left with.
3. Every owned element gets its initial value, by name and index, and is published.
4. The executor gets the model and its states. It knows when a microbatch begins and ends; they know what to do then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from shardwright.comm.mesh import Mesh
from shardwright.nn.decoder import Decoder
from shardwright.nn.dtypes import torch_dtype
from shardwright.parallel.data import DataParallel
from shardwright.parallel.pipeline import Pipeline
from shardwright.parallel.zero.residency import Stage
from shardwright.parallel.zero.states import States
from shardwright.plan.plan import Plan


@dataclass
class Runtime:
    """A plan made real on one rank."""

    plan: Plan
    mesh: Mesh
    model: nn.Module
    states: States
    pipeline: Pipeline


def compose(plan: Plan, mesh: Mesh, model: nn.Module | None = None) -> Runtime:
    """Build a plan's model on a mesh, or lay out a model of the caller's own.

    A model of one's own is called as model(tokens, targets) and returns the sum of the loss over targets. It may have
    been built on the meta device; its values are made anew from `train.seed` in any case. If it has `blocks()`, a list
    of modules in the order of execution that together hold every parameter, each is a unit; else all of it is one.
    """
    if model is None:
        with torch.device("meta"):
            model = Decoder(plan.architecture)
    stage = Stage(plan.spec.parallel.zero, plan.spec.parallel.zero_pipeline == "save_memory")
    states = States(
        model,
        blocks_of(model),
        stage,
        DataParallel.of(mesh, stage.owns_state),
        dtype=torch_dtype(plan.dtype),
        grad_dtype=torch_dtype(plan.grad_dtype),
        device=mesh.device,
    )
    states.initialise(plan.spec.train.seed)
    return Runtime(plan, mesh, model, states, Pipeline(model, states))


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    """A model's own list of blocks, or the whole of it as one."""
    blocks = getattr(model, "blocks", None)
    return blocks() if callable(blocks) else [model]  # type: ignore[return-value]
