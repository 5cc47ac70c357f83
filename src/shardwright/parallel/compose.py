"""The one page that puts the techniques together, in order, with the reason for the order.

1. The model is built as one device would write it, without memory: nothing whole exists anywhere.
2. Tensor parallelism replaces modules by a rank's part of them. It comes first, because it alone looks into modules.
   What the modules that are left compute between products is compiled where `run.compile` says so.
3. Recomputation wraps the forwards of layers, whose modules are now the ones that run.
4. Blocks are cut into stages, and the rank keeps those that the pipeline's placement gives it. This comes after the
   division of modules, so that a parameter shared by two stages is divided alike on both, and before memory exists.
5. Units take the parameters, block by block, into flat buffers owned as the ZeRO stage says. This comes last among the
   things that change modules, because a unit's buffer holds whatever parameters a rank is left with. What is owned
   lives where `memory.offload` says, and is updated there.
6. Every owned element gets its first value, by name and index, from a seed or from what was saved, and is published.
7. The executor gets the stages and their states. It knows when what begins and ends; they know what to do then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn

from shardwright.comm.line import Line
from shardwright.comm.mesh import Mesh
from shardwright.cost.memory import MOMENTS
from shardwright.nn.decoder import Decoder
from shardwright.nn.dtypes import torch_dtype
from shardwright.nn.initial import Seeded, Values
from shardwright.parallel.compiled import compile_kernels
from shardwright.parallel.data import DataParallel
from shardwright.parallel.offload.home import Home, OnDevice
from shardwright.parallel.offload.on_host import OnHost
from shardwright.parallel.offload.streaming import Streaming
from shardwright.parallel.pipeline import Pipeline, Program
from shardwright.parallel.recompute import recompute
from shardwright.parallel.stage import Boundary, cut, layers_of, shared_with
from shardwright.parallel.tensor.apply import divide, table_of
from shardwright.parallel.tensor.region import Region
from shardwright.parallel.zero.membership import Storage, refuse_outside
from shardwright.parallel.zero.residency import ZeroStage
from shardwright.parallel.zero.states import States
from shardwright.plan.pipeline import placement_of, schedule_of
from shardwright.plan.plan import Plan
from shardwright.schedule.action import Schedule
from shardwright.schedule.build import forward_only
from shardwright.schedule.transfers import with_transfers
from shardwright.units import parse_bytes


@dataclass
class Runtime:
    """A plan made real on one rank. Of `model`, the rank has memory for the blocks of its own stages alone."""

    plan: Plan
    mesh: Mesh
    model: nn.Module
    states: States
    pipeline: Pipeline


def compose(
    plan: Plan, mesh: Mesh, model: nn.Module | None = None, values: Values | None = None, *, trains: bool = True
) -> Runtime:
    """Build a plan's model on a mesh, or lay out a model of the caller's own.

    `values` are what its parameters hold; by default they are made from `train.seed`. Without `trains` there is memory
    for parameters alone: the runtime can be evaluated and generate.

    A model of one's own is called as model(tokens, targets) and returns the sum of the loss over targets. It may have
    been built on the meta device; its own values are not used in any case. If it has `blocks()`, a list
    of modules in the order of execution that together hold every parameter, each is a unit; else all of it is one. Its
    `tensor_table()` says how it is divided over `tp`. Over `pp` it is cut between blocks, and must be their chain: the
    first is called with the tokens, the others with what the one before gave, [positions, sequences, hidden], and the
    last with the targets beside it.
    """
    if model is None:
        with torch.device("meta"):
            model = Decoder(plan.architecture)
    region = Region(mesh.tp, plan.spec.parallel.sequence_parallel)
    divide(model, table_of(model, mesh.tp.degree), region)
    if plan.spec.run.compile:
        compile_kernels(model)

    blocks, line, placement = blocks_of(model), Line.of(mesh), placement_of(plan)
    refuse_outside(model, blocks)
    memory = plan.spec.memory
    if memory.recompute != "none":
        recompute(layers_of(model, blocks, plan.architecture.layers), memory.recompute, memory.recompute_layers)
    stages = cut(model, blocks, plan.layers_per_stage)
    own = {stage.number: stage for stage in stages if placement[stage.number] == line.index}

    zero = ZeroStage(plan.spec.parallel.zero, plan.spec.parallel.zero_pipeline == "save_memory")
    data = DataParallel.of(mesh, zero.owns_state)
    dtype = torch_dtype(plan.dtype)
    storage = Storage(zero, data, dtype, torch_dtype(plan.grad_dtype), mesh.device, home_of(plan, mesh.device), trains)
    shared = shared_with(stages, placement, line)
    states = States(model, {number: stage.blocks for number, stage in own.items()}, storage, shared)
    states.initialise(Seeded(plan.spec.train.seed) if values is None else values)

    program = Program(placement, cache(partial(schedule_of, plan)), cache(partial(_evaluation, placement)))
    boundary = Boundary(region, plan.architecture.hidden, dtype, mesh.device)
    return Runtime(plan, mesh, model, states, Pipeline(own, states, line, program, boundary))


def _evaluation(placement: Sequence[int], num_microbatches: int) -> Schedule:
    return with_transfers(forward_only(placement, num_microbatches))


def home_of(plan: Plan, device: torch.device) -> Home:
    """Where owned state lives: what `memory.offload` names."""
    memory, num_moments = plan.spec.memory, MOMENTS[plan.spec.train.optimizer]
    if memory.offload == "state":
        return Streaming(device, parse_bytes(memory.offload_chunk), num_moments)
    return OnHost(device) if memory.offload == "update" else OnDevice()


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    """A model's own list of blocks, or the whole of it as one."""
    blocks = getattr(model, "blocks", None)
    return blocks() if callable(blocks) else [model]  # type: ignore[return-value]
