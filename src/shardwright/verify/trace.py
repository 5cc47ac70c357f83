"""What a few training steps computed, as boxes of global tensors: the thing that is compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from shardwright.comm.mesh import Mesh
from shardwright.data.samples import RandomSamples
from shardwright.layout.box import Box, GlobalTensor, Piece
from shardwright.optim.optimizers import make_optimizer
from shardwright.optim.schedule import learning_rate
from shardwright.parallel.compose import Runtime, compose
from shardwright.plan.plan import Plan
from shardwright.record.store import read_json, write_json
from shardwright.train.batches import rank_batch
from shardwright.train.step import train_step

MAX_IGNORED = 0.4
"""Up to this share of a sample's targets carries no loss, drawn anew for every sample, so that ranks and microbatches
have unequal numbers of them."""


@dataclass(frozen=True)
class Part:
    """One box of a gradient or a parameter after a step, and who computed it. Steps count from 1."""

    step: int
    kind: str  # "gradients" | "parameters"
    box: Box
    rank: int
    values: Tensor


@dataclass
class Trace:
    """Losses by step, and the boxes of gradients (before clipping) and of parameters after each step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)


def samples_for(plan: Plan) -> RandomSamples:
    """The seeded random tokens of a proof."""
    return RandomSamples(plan.architecture.vocab, plan.sequence_length, plan.spec.train.seed, MAX_IGNORED)


def _parts(pieces: list[Piece], flat: Tensor, step: int, kind: str, rank: int) -> Iterator[Part]:
    for piece in pieces:
        values = flat[piece.start : piece.stop].detach().view(piece.box.size).to("cpu", copy=True)
        yield Part(step, kind, piece.box, rank, values)


def trace_layout(plan: Plan, mesh: Mesh, steps: int, runtime: Runtime | None = None) -> Trace:
    """Run `steps` steps of a plan on this rank of a mesh; the parts are those that the rank owns."""
    runtime = compose(plan, mesh) if runtime is None else runtime
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    samples, trace = samples_for(plan), Trace()

    def take(step: int, kind: str) -> None:
        for unit in runtime.states.units:
            flat = unit.owned_gradient if kind == "gradients" else unit.updated_values()
            trace.parts += _parts(unit.owned_pieces, flat, step, kind, mesh.rank)

    for step in range(steps):
        batch = rank_batch(runtime, samples, step)
        lr = learning_rate(plan.spec.train, step)
        result = train_step(
            runtime, optimizer, batch, lr, before_update=lambda _, step=step: take(step + 1, "gradients")
        )
        take(step + 1, "parameters")
        trace.losses.append(result.loss)
        trace.norms.append(result.grad_norm)
    runtime.states.finish()
    return trace


def write_trace(folder: Path, rank: int, trace: Trace) -> None:
    """Write one rank's trace: tensors beside their boxes."""
    tensors = {str(i): part.values.contiguous() for i, part in enumerate(trace.parts)}
    save_file(tensors, folder / f"{rank}.safetensors")
    rows = [
        {
            "step": part.step,
            "kind": part.kind,
            "name": part.box.name,
            "shape": part.box.tensor.shape,
            "offset": part.box.offset,
            "size": part.box.size,
        }
        for part in trace.parts
    ]
    write_json(folder / f"{rank}.json", {"losses": trace.losses, "norms": trace.norms, "parts": rows})


def read_traces(folder: Path, world_size: int) -> list[Trace]:
    """The traces of all ranks."""
    traces = []
    for rank in range(world_size):
        index = read_json(folder / f"{rank}.json")
        tensors = load_file(folder / f"{rank}.safetensors")
        parts = []
        for i, row in enumerate(index["parts"]):
            tensor = GlobalTensor(row["name"], tuple(row["shape"]))
            box = Box(tensor, tuple(row["offset"]), tuple(row["size"]))
            parts.append(Part(row["step"], row["kind"], box, rank, tensors[str(i)]))
        numbers = [[float("nan") if x is None else x for x in index[key]] for key in ("losses", "norms")]
        traces.append(Trace(numbers[0], numbers[1], parts))
    return traces
