"""A step and a run: what is skipped, stopped, repeated and evaluated alike on every rank, and models of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Place, Pool, tiny_plan
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.data.batch import IGNORED
from shardwright.parallel.compose import compose
from shardwright.plan.plan import Plan
from shardwright.verify import reference
from shardwright.verify.compare import BARS, KINDS, compare
from shardwright.verify.trace import Trace, read_traces, trace_layout, write_trace

pytestmark = pytest.mark.world

STEPS, VOCAB, WIDTH = 3, 37, 12


# Models of one's own: model(tokens, targets) is the sum of the loss over targets


class Block(nn.Module):
    """A residual block of plain torch modules; `extra` joins in for some sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.extra = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, with_extra: bool = True) -> Tensor:
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return x + self.extra(x).tanh() if with_extra else x


class Output(nn.Module):
    """The vocabulary product and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.linear(x).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


class Plain(nn.Module):
    """No blocks(): all of it is one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.output = Output()

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(x, targets)


class Blocks(Plain):
    """The same with blocks()."""

    def blocks(self) -> list[nn.Module]:
        return [self.embedding, *self.layers, self.output]


class UnusedHere(Blocks):
    """What joins in is the sequence's choice, so that with one sequence in a microbatch ranks differ in it."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for index, layer in enumerate(self.layers):
            x = layer(x, with_extra=bool(tokens[0, index] % 2))
        return self.output(x, targets)


class UnusedEverywhere(Blocks):
    """One module of a block is never used, and one block's parameters neither."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[1].never = nn.Linear(WIDTH, WIDTH)
        self.bench = nn.Linear(WIDTH, WIDTH)

    def blocks(self) -> list[nn.Module]:
        return [self.embedding, *self.layers, self.bench, self.output]


class SkippedBlock(Blocks):
    """A whole block is the sequence's choice."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for index, layer in enumerate(self.layers):
            x = layer(x) if tokens[0, index] % 2 else x
        return self.output(x, targets)


class Shared(Blocks):
    """Parameters of several blocks are one: a layer's, and the embedding's with the output's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2].up.weight = self.layers[0].up.weight
        self.layers[2].norm = self.layers[0].norm
        self.output.linear.weight = self.embedding.weight


class UsedTwice(Blocks):
    """Blocks run again in the same forward, one at once and one later; a module inside a block as well."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        first, second, third = self.layers
        x = second(second(first(self.embedding(tokens))))
        return self.output(first(third(x)), targets)


MODELS = [Plain, Blocks, UnusedHere, UnusedEverywhere, SkippedBlock, Shared, UsedTwice]


def write_own(place: Place, plan: Plan, kind: type[nn.Module], folder: Path) -> None:
    """In a rank: trace a model of one's own."""
    mesh = place.mesh(plan.topology)
    with torch.device("meta"):
        model = kind()
    write_trace(folder, mesh.rank, trace_layout(plan, mesh, STEPS, compose(plan, mesh, model)))


def own_plan(zero: int, replicate: int, shard: int, **parallel: Any) -> Plan:
    """One sequence in a microbatch."""
    count = 12 // (replicate * shard)
    model = {"layers": 1, "hidden": 4, "heads": 1, "vocab": VOCAB}
    return tiny_plan(
        replicate, shard, count, parallel={"zero": zero, **parallel}, model=model, train={"global_batch_size": 12}
    )


@pytest.fixture(scope="module")
def on_one_device() -> dict[type[nn.Module], Trace]:
    """Each model's trace by plain torch."""
    traces = {}
    with pytest.MonkeyPatch.context() as patch:
        for kind in MODELS:
            patch.setattr(reference, "Decoder", lambda _architecture, kind=kind: kind())
            traces[kind] = reference.trace_one_device(own_plan(0, 1, 1), STEPS)
    return traces


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("replicate", "shard"), [(1, 1), (2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_model_of_ones_own(
    pool: Pool, tmp_path: Path, on_one_device: Any, kind: type[nn.Module], zero: int, replicate: int, shard: int
) -> None:
    plan = own_plan(zero, replicate, shard)
    pool.run(plan.world_size, write_own, plan, kind, tmp_path)
    traces = read_traces(tmp_path, plan.world_size)
    bars = {kind: BARS["fp64"] for kind in KINDS}
    found = compare(traces, on_one_device[kind], plan, STEPS, bars)
    assert found.first_difference is None and found.missing is None
