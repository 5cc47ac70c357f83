"""The one page that puts the techniques together, in order, with the reason for the order.

1. The model is built as one device would write it, without memory: nothing whole exists anywhere.
2. Tensor parallelism replaces modules by a rank's part of them. It comes first, because it alone looks into modules.
3. Units take the parameters, block by block, into flat buffers owned as the ZeRO stage says. This comes last among the
   things that change modules, because a unit's buffer holds whatever parameters a rank is left with.
4. Every owned element gets its initial value, by name and index, and is published.
5. The executor gets the model and its states. It knows when a microbatch begins and ends; they know what to do then.
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
from shardwright.parallel.tensor.apply import divide, table_of
from shardwright.parallel.tensor.region import Region
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
    of modules in the order of execution that together hold every parameter, each is a unit; else all of it is one. Its
    `tensor_table()` says how it is divided over `tp`.
    """
    if model is None:
        with torch.device("meta"):
            model = Decoder(plan.architecture)
    region = Region(mesh.tp, plan.spec.parallel.sequence_parallel)
    divide(model, table_of(model, mesh.tp.degree), region)
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
