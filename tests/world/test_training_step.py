"""A step and a run: what is skipped, stopped, repeated and evaluated alike on every rank, and models of one's own."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import Place, Pool, tiny_plan
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.comm.mesh import Mesh
from shardwright.data.batch import IGNORED
from shardwright.data.dataset import Dataset
from shardwright.data.samples import RandomSamples
from shardwright.errors import LayoutError, RunError
from shardwright.layout.mesh import Topology
from shardwright.nn.decoder import Decoder
from shardwright.nn.initial import fill
from shardwright.nn.parameters import pieces_of
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import Runtime, compose
from shardwright.plan.plan import Plan
from shardwright.record.records import StepRecord, ValidationRecord
from shardwright.train.loop import Outcome, TrainingLoop
from shardwright.units import Seconds
from shardwright.verify import reference
from shardwright.verify.compare import BARS, KINDS, compare
from shardwright.verify.trace import Trace, read_traces, trace_layout, write_trace

pytestmark = pytest.mark.world

STEPS, VOCAB, WIDTH = 2, 37, 12
CPU = torch.device("cpu")


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
    """Parameters of several blocks are one: a layer's, and the embedding's with the output's. One has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2].up.weight = self.layers[0].up.weight
        self.layers[2].norm = self.layers[0].norm
        self.output.linear.weight = self.embedding.weight
        self.layers[1].down.alias = self.layers[1].down.weight


class UsedTwice(Blocks):
    """Blocks run again in the same forward, one at once and one later; a module inside a block as well."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        first, second, third = self.layers
        x = second(second(first(self.embedding(tokens))))
        return self.output(first(third(x)), targets)


class Outer(Block):
    """A block that runs another one before its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()

    def forward(self, x: Tensor, with_extra: bool = True) -> Tensor:
        return super().forward(self.inner(x), with_extra)


class Nested(Blocks):
    """A block inside a block: leaving the inner one is no leave to forget the outer one's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[1] = Outer()

    def blocks(self) -> list[nn.Module]:
        first, outer, last = self.layers
        return [self.embedding, first, outer, outer.inner, last, self.output]


class Recurrent(Decoder):
    """Shardwright's own layers, which write their gradients themselves, each used twice in a forward."""

    def __init__(self) -> None:
        super().__init__(tiny_plan().architecture)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        x = self.embedding(tokens_BT)
        for layer in (*self.layers, *self.layers):
            x = layer(x)
        return x


MODELS = [Recurrent, Plain, Blocks, UnusedHere, UnusedEverywhere, SkippedBlock, Shared, UsedTwice, Nested]


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


def own_layouts() -> list[tuple[type[nn.Module], int, int, int]]:
    """Under ZeRO-3 a rank that runs a block needs the others to gather it, so all of them run the same blocks."""
    rows = [(k, z, r, s) for k in MODELS for z in range(4) for r, s in [(1, 1), (2, 1), (1, 3), (2, 2)]]
    return [row for row in rows if row[0] is not SkippedBlock or row[1] < 3 or row[3] == 1]


@pytest.mark.parametrize(("kind", "zero", "replicate", "shard"), own_layouts())
def test_a_model_of_ones_own(
    pool: Pool, tmp_path: Path, on_one_device: Any, kind: type[nn.Module], zero: int, replicate: int, shard: int
) -> None:
    check_own(pool, tmp_path, on_one_device, kind, own_plan(zero, replicate, shard))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("zero", [2, 3])
def test_a_model_of_ones_own_that_saves_communication(
    pool: Pool, tmp_path: Path, on_one_device: Any, kind: type[nn.Module], zero: int
) -> None:
    if kind is not SkippedBlock or zero < 3:
        check_own(pool, tmp_path, on_one_device, kind, own_plan(zero, 1, 2, zero_pipeline="save_communication"))


def check_own(pool: Pool, folder: Path, on_one_device: Any, kind: type[nn.Module], plan: Plan) -> None:
    pool.run(plan.world_size, write_own, plan, kind, folder)
    traces = read_traces(folder, plan.world_size)
    found = compare(traces, on_one_device[kind], plan, STEPS, {kind: BARS["fp64"] for kind in KINDS})
    assert found.first_difference is None and found.missing is None


def test_shared_parameters_stay_one() -> None:
    runtime = compose(own_plan(1, 1, 1), Mesh(Topology(), CPU), Shared())
    model = runtime.model
    assert isinstance(model, Shared)
    assert model.layers[2].up.weight is model.layers[0].up.weight
    assert model.output.linear.weight is model.embedding.weight
    assert model.layers[1].down.alias is model.layers[1].down.weight
    names = [piece.box.name for unit in runtime.states.units for piece in unit.layout.pieces]
    assert len(names) == len(set(names)) and "output.linear.weight" not in names


def test_what_cannot_be_laid_out_is_refused() -> None:
    frozen, homeless = Blocks(), Blocks()
    frozen.layers[1].up.weight.requires_grad_(False)
    homeless.scale = nn.Parameter(torch.ones(3))
    for model, name in ((frozen, "layers.1.up.weight"), (homeless, "scale")):
        with pytest.raises(LayoutError, match=f"^{name}: ") as caught:
            compose(own_plan(0, 1, 1), Mesh(Topology(), CPU), model)
        assert caught.value.way_out


def test_a_backward_behind_the_engines_back_is_refused() -> None:
    runtime = compose(own_plan(0, 1, 1), Mesh(Topology(), CPU), Plain())
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"outside States\.backward"):
        runtime.model(tokens, tokens).backward()


# Runs


class HalfMasked(RandomSamples):
    """Of every four samples the first two carry no loss, so that a whole rank may have none."""

    def _fill(self, sample: int, tokens: np.ndarray, targets: np.ndarray) -> None:
        super()._fill(sample, tokens, targets)
        if sample % 4 < 2:
            targets[:] = IGNORED


class AllMasked(RandomSamples):
    """No loss anywhere."""

    def _fill(self, sample: int, tokens: np.ndarray, targets: np.ndarray) -> None:
        super()._fill(sample, tokens, targets)
        targets[:] = IGNORED


@dataclass
class Report:
    """What a rank's run was: its records, and after every step a fingerprint of parameters and optimizer state."""

    records: list[StepRecord]
    validations: list[ValidationRecord]
    states: list[str]
    outcome: Outcome
    residencies: set[str] = field(default_factory=set)  # of all units after evaluations
    error: str | None = None

    @property
    def losses(self) -> list[float]:
        return [record.loss for record in self.records]


@dataclass(frozen=True)
class Ask:
    """What is odd about a run: where it breaks (from rank 1), which rank asks to stop, and what it reads."""

    poison: str = ""  # loss | gradient
    poisoned: tuple[int, ...] = ()
    stops: tuple[int, int] | None = None  # rank, step
    samples: type[RandomSamples] = RandomSamples
    validation: int = 0  # samples


def train(place: Place, plan: Plan, ask: Ask) -> Report:
    """In a rank: the whole loop of a plan."""
    runtime = compose(plan, place.mesh(plan.topology))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    report = Report([], [], [], Outcome())

    class Watch:
        def on_step(self, record: StepRecord) -> None:
            report.records.append(record)
            report.states.append(fingerprint(runtime, optimizer))

        def on_validation(self, record: ValidationRecord) -> None:
            report.validations.append(replace(record, seconds=Seconds(0.0)))
            report.residencies |= {str(unit.residency) for unit in runtime.states.units}

    def stop_requested() -> bool:
        return ask.stops == (place.rank, len(report.records))

    vocab, length = plan.architecture.vocab, plan.sequence_length
    held_out = RandomSamples(vocab, length, 5, 0.4, length=ask.validation) if ask.validation else None
    data = Dataset(ask.samples(vocab, length, 3), held_out, vocab, None, "", "", 0, 0, None)
    loop = TrainingLoop(runtime, optimizer, data, [Watch()], stop_requested)
    with pytest.MonkeyPatch.context() as patch:
        if ask.poison and place.rank == min(1, plan.world_size - 1):
            {"loss": poison_loss, "gradient": poison_gradient}[ask.poison](runtime, report, ask.poisoned, patch)
        try:
            report.outcome = loop.run()
        except RunError as error:
            report.error = str(error)
    return report


def fingerprint(runtime: Runtime, optimizer: Any) -> str:
    """Of every bit that a step may change."""
    digest = hashlib.sha256()
    for unit in runtime.states.units:
        unit.need()
        for tensor in (unit.whole, unit.masters, *optimizer.state(unit.name).values()):
            digest.update(tensor.detach().clone().reshape(-1).view(torch.uint8).numpy().tobytes())
        unit.release()
    return digest.hexdigest()


def poison_loss(runtime: Runtime, report: Report, steps: tuple[int, ...], patch: pytest.MonkeyPatch) -> None:
    run = runtime.pipeline.run

    def poisoned(microbatches: Any, scale: Tensor) -> Tensor:
        return run(microbatches, scale) + (math.inf if len(report.records) in steps else 0.0)

    patch.setattr(runtime.pipeline, "run", poisoned)


def poison_gradient(runtime: Runtime, report: Report, steps: tuple[int, ...], patch: pytest.MonkeyPatch) -> None:
    unit = runtime.states.units[1]
    accumulate = unit.accumulate

    def poisoned(index: int, *arguments: Any) -> None:
        accumulate(index, *arguments)
        if len(report.records) in steps and index == 0:
            unit._gradient_view(unit.layout.slots[index]).view(-1)[0] = math.nan

    patch.setattr(unit, "accumulate", poisoned)


def loop_plan(zero: int, replicate: int, shard: int, data: dict[str, Any] | None = None, **settings: Any) -> Plan:
    fields = {"steps": 4, "global_batch_size": 8, "micro_batch_size": 1, "dtype": "fp32"} | settings
    return tiny_plan(replicate, shard, train=fields, parallel={"zero": zero}, data=data or {})


LAYOUTS = [(0, 1, 1), (0, 2, 1), (1, 1, 2), (2, 1, 3), (3, 2, 2)]


def batch_for(dp: int) -> dict[str, int]:
    return {"global_batch_size": 12 if dp == 3 else 8}


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize(("zero", "replicate", "shard"), LAYOUTS)
def test_steps_that_are_not_finite_are_skipped_alike(
    pool: Pool, poison: str, zero: int, replicate: int, shard: int
) -> None:
    plan = loop_plan(zero, replicate, shard, max_nonfinite_steps=3, **batch_for(replicate * shard))
    reports = pool.run(plan.world_size, train, plan, Ask(poison, poisoned=(1, 2)))
    for report in reports:
        assert [record.applied for record in report.records] == [True, False, False, True]
        assert report.error is None and (report.outcome.skipped, report.outcome.steps) == (2, 4)
        first, second, third, last = report.states
        assert first == second == third != last
        finite = [math.isfinite(r.loss if poison == "loss" else r.grad_norm) for r in report.records]
        assert finite == [True, False, False, True]
    if poison == "gradient":
        assert all(math.isfinite(record.loss) for record in reports[0].records)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize(("zero", "replicate", "shard"), LAYOUTS)
def test_too_many_of_them_in_a_row_end_the_run_on_every_rank(
    pool: Pool, poison: str, zero: int, replicate: int, shard: int
) -> None:
    plan = loop_plan(zero, replicate, shard, max_nonfinite_steps=2, **batch_for(replicate * shard))
    for report in pool.run(plan.world_size, train, plan, Ask(poison, poisoned=(0, 2, 3))):
        assert [record.applied for record in report.records] == [False, True, False, False]
        assert report.error is not None
        assert report.error.startswith(
            "train.max_nonfinite_steps: 2 steps in a row up to step 4 were not finite (loss "
        )
        assert "lower train.lr" in report.error


@pytest.mark.parametrize(("zero", "replicate", "shard"), LAYOUTS)
def test_a_stop_request_on_one_rank_stops_all_after_the_same_step(
    pool: Pool, zero: int, replicate: int, shard: int
) -> None:
    plan = loop_plan(zero, replicate, shard, **batch_for(replicate * shard))
    ask = Ask(stops=(plan.world_size - 1, 2))
    for report in pool.run(plan.world_size, train, plan, ask):
        assert (report.outcome.stopped, report.outcome.steps, len(report.records)) == (True, 3, 3)
        assert report.records[-1].applied


def test_stop_after_ends_early_on_the_same_schedule(pool: Pool) -> None:
    (whole,) = pool.run(1, train, loop_plan(0, 1, 1), Ask())
    (short,) = pool.run(1, train, loop_plan(0, 1, 1, stop_after=2), Ask())
    assert (short.outcome.steps, short.outcome.stopped) == (2, False)
    assert [(r.loss, r.lr) for r in short.records] == [(r.loss, r.lr) for r in whole.records[:2]]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_twice_in_a_row_is_bitwise_the_same(pool: Pool, zero: int, dtype: str) -> None:
    plan = loop_plan(zero, 2, 2, dtype=dtype)
    once, again = (pool.run(4, train, plan, Ask()) for _ in range(2))
    for first, second in zip(once, again, strict=True):
        assert first.losses == second.losses == once[0].losses
        assert first.states == second.states
        assert [r.grad_norm for r in first.records] == [r.grad_norm for r in once[0].records]


@pytest.mark.parametrize(("zero", "replicate", "shard"), LAYOUTS)
@pytest.mark.parametrize("samples", [HalfMasked, AllMasked])
def test_ranks_without_any_target(
    pool: Pool, samples: type[RandomSamples], zero: int, replicate: int, shard: int
) -> None:
    fields = {"dtype": "fp64", "steps": 2, "global_batch_size": 12}
    (expected,) = pool.run(1, train, loop_plan(0, 1, 1, **fields), Ask(samples=samples))
    plan = loop_plan(zero, replicate, shard, **fields)
    for report in pool.run(plan.world_size, train, plan, Ask(samples=samples)):
        assert report.losses == pytest.approx(expected.losses, rel=1e-12, abs=0)
        assert [r.num_targets for r in report.records] == [r.num_targets for r in expected.records]
        assert all(record.applied for record in report.records)
    assert expected.records[0].num_targets == (0 if samples is AllMasked else 6 * 5)


# Evaluation


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize(("zero", "replicate", "shard"), LAYOUTS)
@pytest.mark.parametrize("micro", [1, 2])
def test_evaluation_gives_the_same_loss_on_every_layout(
    pool: Pool, micro: int, zero: int, replicate: int, shard: int, count: int
) -> None:
    size = {"global_batch_size": replicate * shard * micro * 2, "micro_batch_size": micro}
    plan = loop_plan(zero, replicate, shard, dtype="fp64", steps=1, lr=1e-12, **size)
    reports = pool.run(plan.world_size, train, plan, Ask(validation=count))
    loss, num_targets = plain_evaluation(plan, count)
    for report in reports:
        before, after = report.validations
        assert (before.step, after.step) == (0, 1)
        assert before.num_targets == after.num_targets == num_targets
        assert before.loss == pytest.approx(loss, rel=1e-12) and after.loss == pytest.approx(loss, rel=1e-9)
        assert report.validations == reports[0].validations


def plain_evaluation(plan: Plan, count: int) -> tuple[float, int]:
    model = Decoder(plan.architecture).double()
    for parameter, pieces in pieces_of(model).items():
        for piece in pieces:
            fill(parameter.detach().view(-1)[piece.start : piece.stop], piece.box, plan.spec.train.seed)
    batch = RandomSamples(plan.architecture.vocab, plan.sequence_length, 5, 0.4, length=count).at(range(count))
    with torch.no_grad():
        logits = model.logits(torch.from_numpy(batch.tokens)).flatten(0, 1)
        loss = F.cross_entropy(logits, torch.from_numpy(batch.targets).flatten(), ignore_index=IGNORED)
    return float(loss), batch.num_targets()


@pytest.mark.parametrize(("zero", "replicate", "shard"), LAYOUTS)
def test_evaluation_between_steps_changes_nothing(pool: Pool, zero: int, replicate: int, shard: int) -> None:
    fields = {"steps": 3, "global_batch_size": 12}
    often = loop_plan(zero, replicate, shard, data={"eval_every": 1, "eval_batches": 1}, **fields)
    watched = pool.run(often.world_size, train, often, Ask(validation=5))
    alone = pool.run(often.world_size, train, loop_plan(zero, replicate, shard, **fields), Ask())
    for report, other in zip(watched, alone, strict=True):
        assert [validation.step for validation in report.validations] == [0, 1, 2, 3]
        assert report.outcome.first_validation is not None and report.outcome.last_validation is not None
        assert report.outcome.first_validation.loss == report.validations[0].loss
        assert report.outcome.last_validation.loss == report.validations[-1].loss
        assert (report.losses, report.states) == (other.losses, other.states)
        assert other.validations == []


@pytest.mark.parametrize("pipeline", ["save_memory", "save_communication"])
def test_evaluation_leaves_parameters_with_their_owners(pool: Pool, pipeline: str) -> None:
    plan = tiny_plan(1, 2, train={"steps": 1}, parallel={"zero": 3, "zero_pipeline": pipeline})
    for report in pool.run(2, train, plan, Ask(validation=5)):
        assert report.residencies == {"owned"}


def test_one_evaluation_reads_eval_batches_global_batches(pool: Pool) -> None:
    plan = loop_plan(0, 1, 1, data={"eval_batches": 2}, steps=1, global_batch_size=2)
    (report,) = pool.run(1, train, plan, Ask(validation=100))
    batch = RandomSamples(plan.architecture.vocab, plan.sequence_length, 5, 0.4).at(range(4))
    assert report.validations[0].num_targets == batch.num_targets()
