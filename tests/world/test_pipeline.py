"""Pipelines compute what one device computes under every schedule and ZeRO stage; what is broken on purpose is seen."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import GPT2, LLAMA, QWEN, STEPS, Fault, compared, plan_of
from pool import Place, Pool
from torch import nn

from shardwright.comm.collectives import DONE
from shardwright.errors import LayoutError
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel import pipeline as executor
from shardwright.parallel.compose import Runtime, compose
from shardwright.parallel.zero import unit as units
from shardwright.plan.memory import estimated_memory
from shardwright.plan.pipeline import schedule_of
from shardwright.plan.plan import Plan
from shardwright.schedule.action import Action, Kind
from shardwright.train import step as stepping
from shardwright.train.ledger import measured_memory
from shardwright.verify.compare import BARS, KINDS, compare
from shardwright.verify.trace import read_traces, trace_layout, write_trace

pytestmark = pytest.mark.world

FAMILIES = {"llama": LLAMA | {"kv_heads": 4}, "qwen": QWEN | {"kv_heads": 3}, "gpt2": GPT2 | {"kv_heads": 12}}

# family, layers, tied, microbatches, dp, tp, pp, zero, schedule, virtual stages, more
CASES: list[tuple[Any, ...]] = [
    # every schedule with every ZeRO stage, and what each of them meets in the others
    ("llama", 4, False, 4, 1, 1, 2, 0, "gpipe", 1, {}),
    ("qwen", 5, True, 3, 2, 1, 2, 1, "gpipe", 1, {}),
    ("gpt2", 4, True, 1, 2, 1, 2, 2, "gpipe", 1, {}),
    ("llama", 4, True, 5, 2, 1, 2, 3, "gpipe", 1, {"zero_pipeline": "save_communication"}),
    ("llama", 4, True, 9, 1, 1, 4, 0, "1f1b", 1, {}),
    ("qwen", 7, False, 6, 1, 1, 3, 1, "1f1b", 1, {"stages": [1, 4, 2]}),
    ("gpt2", 4, False, 5, 2, 1, 2, 2, "1f1b", 1, {"zero_pipeline": "save_communication"}),
    ("llama", 5, True, 4, 2, 1, 2, 3, "1f1b", 1, {}),
    ("llama", 4, False, 2, 1, 2, 2, 0, "1f1b", 1, {}),
    ("qwen", 4, True, 3, 1, 2, 2, 3, "1f1b", 1, {}),
    ("gpt2", 6, True, 4, 1, 1, 2, 0, "interleaved", 2, {}),
    ("llama", 9, False, 5, 1, 1, 3, 1, "interleaved", 3, {}),
    ("qwen", 5, True, 4, 2, 1, 2, 2, "interleaved", 2, {}),
    ("llama", 6, True, 3, 2, 1, 2, 3, "interleaved", 3, {}),
    ("gpt2", 4, False, 2, 2, 1, 2, 3, "interleaved", 2, {"zero_pipeline": "save_communication"}),
    ("llama", 4, True, 7, 1, 2, 2, 1, "interleaved", 2, {"sequence_parallel": False}),
    ("llama", 4, True, 6, 1, 1, 4, 0, "zb-h1", 1, {}),
    ("qwen", 4, False, 3, 1, 1, 4, 1, "zb-h1", 1, {}),
    ("gpt2", 4, True, 5, 2, 1, 2, 2, "zb-h1", 1, {}),
    ("llama", 4, True, 4, 2, 1, 2, 3, "zb-h1", 1, {}),
    ("qwen", 4, True, 5, 2, 1, 2, 3, "zb-h1", 1, {"zero_pipeline": "save_communication"}),
    ("gpt2", 5, False, 4, 1, 2, 2, 3, "zb-h1", 1, {"stages": [4, 1]}),
    ("llama", 4, True, 4, 1, 1, 2, 0, "zbv", 2, {}),
    ("qwen", 8, False, 9, 1, 1, 4, 1, "zbv", 2, {}),
    ("gpt2", 4, True, 3, 2, 1, 2, 2, "zbv", 2, {}),
    ("llama", 5, True, 5, 2, 1, 2, 3, "zbv", 2, {}),
    ("llama", 6, True, 2, 1, 1, 3, 2, "zbv", 2, {"stages": [1, 1, 1, 1, 1, 1]}),
    ("llama", 4, True, 2, 2, 1, 2, 1, "zbv", 2, {"dp_shard": 1}),
    ("llama", 4, True, 3, 1, 1, 1, 1, "zb-h1", 1, {}),
    ("qwen", 4, True, 4, 1, 1, 1, 3, "interleaved", 2, {}),
]


def case_plan(case: tuple[Any, ...], **train: Any) -> Plan:
    family, layers, tied, microbatches, dp, tp, pp, zero, schedule, virtual, more = case
    model = FAMILIES[family] | {"layers": layers, "tied_embeddings": tied}
    parallel = {"dp": dp, "tp": tp, "pp": pp, "zero": zero, "pipeline_schedule": schedule, "virtual_stages": virtual}
    batch = {"global_batch_size": dp * microbatches, "micro_batch_size": 1}
    return plan_of(model, parallel | more, **batch | train)


def name(case: tuple[Any, ...]) -> str:
    _, _, tied, microbatches, dp, tp, pp, zero, schedule, virtual, _ = case
    return f"{schedule}{virtual if virtual > 1 else ''}-dp{dp}tp{tp}pp{pp}-zero{zero}-m{microbatches}" + "-tied" * tied


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_layout_computes_what_one_device_computes(pool: Pool, tmp_path: Path, case: tuple[Any, ...]) -> None:
    found = compared(pool, case_plan(case), tmp_path)
    assert found.missing is None
    assert found.first_difference is None, found.first_difference


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_fp32_under_sgd(pool: Pool, tmp_path: Path, schedule: str) -> None:
    case = ("qwen", 4, True, 4, 2, 1, 2, 2, schedule, 2 if schedule == "zbv" else 1, {})
    found = compared(pool, case_plan(case, dtype="fp32", optimizer="sgd"), tmp_path)
    assert found.parameters is not None and found.first_difference is None, found.first_difference


# Faults


def loss_scaled_by_microbatches(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    run = runtime.pipeline.run
    patch.setattr(runtime.pipeline, "run", lambda microbatches, scale: run(microbatches, scale * len(microbatches)))


def tied_gradients_not_summed(_runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(units, "exchange_sum", lambda *_, **__: DONE)


def a_layer_dropped(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """The stage's second layer is left out of the chain, as where layers do not divide by stages."""
    for stage in runtime.pipeline.stages.values():
        if not stage.is_first:
            patch.setattr(stage, "blocks", stage.blocks[:1] + stage.blocks[2:])


def norm_of_each_stage(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """Each stage clips by the norm of its own gradients."""
    check = stepping.Health.check

    def own(runtime: Runtime, *rest: Any) -> stepping.Health:
        squared = float(runtime.states.squared_norm())
        return replace(check(runtime, *rest), grad_norm=squared**0.5)

    patch.setattr(stepping.Health, "check", staticmethod(own))


def a_swapped_transfer(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """Two microbatches' activations change places on their way."""
    if any(stage.is_first for stage in runtime.pipeline.stages.values()):
        perform = executor.Execution.perform

        def swapping(self: Any, action: Action, **more: Any) -> None:
            if action.kind is Kind.SEND_OUTPUT and action.microbatch == 0:
                return
            perform(self, action, **more)
            if action.kind is Kind.SEND_OUTPUT and action.microbatch == 1:
                perform(self, replace(action, microbatch=0))

        patch.setattr(executor.Execution, "perform", swapping)


def a_weight_gradient_lost(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """One W does nothing but its bookkeeping."""
    weight_gradient = runtime.states.weight_gradient
    lost: list[Any] = []

    def losing(passage: Any) -> None:
        if not lost:
            lost.append(passage)
            passage.deferred.clear()
        weight_gradient(passage)

    patch.setattr(runtime.states, "weight_gradient", losing)


def tied_weight_counted_twice(runtime: Runtime, _patch: pytest.MonkeyPatch) -> None:
    for unit in runtime.states.units:
        vars(unit.layout)["counted"] = ((0, unit.layout.length),)


@pytest.mark.parametrize(
    ("fault", "schedule", "kind"),
    [
        (loss_scaled_by_microbatches, "1f1b", "loss"),
        (tied_gradients_not_summed, "1f1b", "gradients"),
        (tied_gradients_not_summed, "zb-h1", "gradients"),
        (a_layer_dropped, "1f1b", "gradients"),
        (norm_of_each_stage, "1f1b", "parameters"),
        (tied_weight_counted_twice, "1f1b", "parameters"),
        (a_swapped_transfer, "gpipe", "gradients"),
        (a_weight_gradient_lost, "zb-h1", "gradients"),
    ],
)
def test_a_fault_is_seen_a_thousandfold(pool: Pool, tmp_path: Path, fault: Fault, schedule: str, kind: str) -> None:
    case = ("llama", 5, True, 4, 1, 1, 2, 1, schedule, 1, {"stages": [2, 3]})
    found = compared(pool, case_plan(case, optimizer="sgd"), tmp_path, fault)
    assert found.first_difference is not None
    assert (found.errors()[kind] or 0.0) > 1000 * BARS["fp64"], found


# What is held and what is sent


def ledger(place: Place, plan: Plan) -> tuple[int, int]:
    """In a rank: bytes of state, estimated and measured."""
    runtime = compose(plan, place.mesh(plan.topology))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    measured = measured_memory(runtime, optimizer, transient=False)
    return estimated_memory(plan, runtime.mesh.rank).total, measured.total


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("schedule", "virtual"), [("1f1b", 1), ("interleaved", 2), ("zbv", 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ledger_is_what_the_formula_says(pool: Pool, family: str, schedule: str, virtual: int, tied: bool) -> None:
    plan = case_plan((family, 5, tied, 2, 1, 2, 2, 1, schedule, virtual, {}))
    for estimated, measured in pool.run(4, ledger, plan):
        assert estimated == measured


def between_microbatches(place: Place, plan: Plan) -> list[int]:
    """In a rank: elements of whole gradients and of whole parameters that exist between microbatches."""
    runtime = compose(plan, place.mesh(plan.topology))
    seen: list[int] = []

    def look() -> None:
        held = [unit.resident()["communication"] for unit in runtime.states.units]
        seen.append(sum(tensor.numel() for tensors in held for tensor in tensors))

    runtime.pipeline.between = look
    trace_layout(plan, runtime.mesh, 1, runtime)
    return seen


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize(("schedule", "virtual"), [("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zbv", 2)])
def test_nothing_whole_rests_between_microbatches(pool: Pool, schedule: str, virtual: int, zero: int) -> None:
    plan = case_plan(("llama", 4, True, 4, 2, 1, 2, zero, schedule, virtual, {}))
    expected = 4 * virtual - 1  # after every B or W but the last
    for seen in pool.run(4, between_microbatches, plan):
        assert seen == [0] * expected


def sent(place: Place, plan: Plan) -> Counter[str]:
    """In a rank: bytes sent along `pp` in one step, by reason."""
    mesh = place.mesh(plan.topology)
    runtime = compose(plan, mesh)
    mesh.ledger.clear()
    trace_layout(plan, mesh, 1, runtime)
    return Counter({reason: row.sent for (_, axis, reason), row in mesh.ledger.rows.items() if axis == "pp"})


def test_a_stage_sends_its_output_and_the_gradient_of_its_input(pool: Pool) -> None:
    plan = case_plan(("llama", 4, True, 5, 1, 2, 2, 0, "1f1b", 1, {}))
    first, _, last, _ = pool.run(4, sent, plan)
    activation = 7 * 1 * 24 * 8  # positions of a rank (13 padded to 14 over tp = 2), sequences, hidden, bytes
    embedding = 254 * 24 * 8 // 1  # words of the first tp rank
    padded = -(-embedding // (16 * 8)) * 16 * 8
    assert first == Counter({"pipeline/activation": 5 * activation, "pipeline/tied": padded})
    assert last == Counter({"pipeline/gradient": 5 * activation, "pipeline/tied": padded})


def test_a_rank_runs_the_plans_schedule(pool: Pool) -> None:
    plan = case_plan(CASES[4])
    performed = pool.run(4, actions_of, plan)
    assert tuple(tuple(actions) for actions in performed) == schedule_of(plan).actions


def actions_of(place: Place, plan: Plan) -> list[Action]:
    """In a rank: the actions of one step as they were performed."""
    runtime, performed = compose(plan, place.mesh(plan.topology)), []
    perform = executor.Execution.perform

    def noting(self: Any, action: Action, **more: Any) -> None:
        performed.append(action)
        perform(self, action, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor.Execution, "perform", noting)
        trace_layout(plan, runtime.mesh, 1, runtime)
    return performed


# Models of one's own


class Chain(nn.Module):
    """A model whose linear layers no table names; embedding and output may be one parameter."""

    def __init__(
        self, layers: int, tied: bool, shared_layer: bool = False, same: dict[int, int] | None = None, repeat: int = 1
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(61, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(layers // repeat)] * repeat)
        for layer, other in (same or {}).items():
            self.layers[layer].weight = self.layers[other].weight
        self.output = Output(self.embedding.weight if tied else nn.Parameter(torch.empty(61, 16)))
        if shared_layer:
            for layer in self.layers:
                layer.weight = self.embedding.weight

    def blocks(self) -> list[nn.Module]:
        return [First(self.embedding), *self.layers, self.output]

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = tokens
        for block in self.blocks()[:-1]:
            x = block(x)
        return self.output(x, targets)


class First(nn.Module):
    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding(tokens.T)


class Output(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = (x @ self.weight.T).flatten(0, 1)
        return nn.functional.cross_entropy(logits, targets.T.flatten(), ignore_index=-1, reduction="sum")


def own_model(place: Place, plan: Plan, folder: Path, arguments: tuple[Any, ...]) -> str:
    """In a rank: a model of one's own on this layout; what it was refused with."""
    mesh = place.mesh(plan.topology)
    model = Chain(*arguments)
    blocks = model.blocks()  # made once: hooks sit on these modules
    model.blocks = lambda: blocks
    try:
        runtime = compose(plan, mesh, model)
    except LayoutError as error:
        return str(error)
    write_trace(folder, mesh.rank, trace_layout(plan, mesh, STEPS, runtime))
    return ""


OWN = {"layers": 4, "hidden": 16, "heads": 4, "ffn": 16, "vocab": 61}


@pytest.mark.parametrize(("schedule", "tied"), [("1f1b", False), ("1f1b", True), ("zb-h1", True), ("zbv", True)])
def test_a_users_own_model_is_the_same_in_a_pipeline_as_on_one_rank(
    pool: Pool, tmp_path: Path, schedule: str, tied: bool
) -> None:
    one = plan_of(OWN, {"dp": 1})
    piped = plan_of(OWN, {"dp": 2, "pp": 2, "zero": 3, "pipeline_schedule": schedule})
    for plan in (one, piped):
        (tmp_path / str(plan.world_size)).mkdir()
        told = pool.run(plan.world_size, own_model, plan, tmp_path / str(plan.world_size), (4, tied))
        assert told == [""] * plan.world_size
    (reference,) = read_traces(tmp_path / "1", 1)
    found = compare(read_traces(tmp_path / "4", 4), reference, piped, STEPS, {kind: BARS["fp64"] for kind in KINDS})
    assert found.missing is None and found.first_difference is None, found.first_difference


SHARING: list[tuple[dict[int, int], int, str, int]] = [
    ({2: 0}, 1, "1f1b", 2),  # the weight alone is shared; the bias of the same module is not
    ({3: 0, 2: 1}, 1, "1f1b", 2),  # two, in opposite orders on their two ranks
    ({2: 1, 4: 3, 5: 0}, 1, "1f1b", 3),  # a ring of three ranks
    ({}, 4, "interleaved", 2),  # one block in every stage
    ({}, 2, "zbv", 2),
]


@pytest.mark.parametrize(("same", "repeat", "schedule", "pp"), SHARING, ids=[str(i) for i in range(len(SHARING))])
def test_layers_that_share_across_stages(
    pool: Pool, tmp_path: Path, same: dict[int, int], repeat: int, schedule: str, pp: int
) -> None:
    layers = 6 if pp == 3 else 4
    virtual = 1 if schedule == "1f1b" else 2
    parallel = {"dp": 1, "pp": pp, "pipeline_schedule": schedule, "virtual_stages": virtual}
    parallel["stages"] = [layers // (pp * virtual)] * (pp * virtual)
    one, piped = plan_of(OWN | {"layers": layers}, {"dp": 1}), plan_of(OWN | {"layers": layers}, parallel)
    for plan in (one, piped):
        (tmp_path / str(plan.world_size)).mkdir()
        arguments = (layers, False, False, same, repeat)
        told = pool.run(plan.world_size, own_model, plan, tmp_path / str(plan.world_size), arguments)
        assert told == [""] * plan.world_size
    (reference,) = read_traces(tmp_path / "1", 1)
    found = compare(
        read_traces(tmp_path / str(pp), pp), reference, piped, STEPS, {kind: BARS["fp64"] for kind in KINDS}
    )
    assert found.missing is None and found.first_difference is None, found.first_difference


class Transposed(First):
    """Gives sequences before positions."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding(tokens)


def wrong_boundary(place: Place, plan: Plan) -> str:
    """In a rank: what a model is told whose blocks exchange another shape; the others lose it."""
    model = Chain(4, False)
    model.blocks = lambda: [Transposed(model.embedding), *model.layers, model.output]
    runtime = compose(plan, place.mesh(plan.topology), model)
    try:
        trace_layout(plan, runtime.mesh, 1, runtime)
    except LayoutError as error:
        return str(error)
    return ""


def test_a_boundary_of_another_shape_is_refused(pool: Pool) -> None:
    plan = plan_of(OWN, {"dp": 1, "pp": 1, "pipeline_schedule": "interleaved", "virtual_stages": 2})
    assert pool.run(1, wrong_boundary, plan) == [
        "parallel.pp: Linear, the last block of stage 0, gives torch.float64 [2, 13, 16], but torch.float64 "
        "[13, 2, 16] goes from stage to stage\n"
        "  blocks exchange [positions, sequences, model.hidden] in the dtype of the plan"
    ]


@pytest.mark.parametrize(
    ("arguments", "pp", "message"),
    [
        (
            (3, False),
            2,
            "parallel.pp: 2 stages of [2, 2] layers, but Chain has 5 blocks\n"
            "  blocks() is what comes before the layers, model.layers layers, and the head with the loss",
        ),
        (
            (4, True, True),
            3,
            "parallel.pp: a parameter is used by stages on 3 ranks of the pipeline\n"
            "  let at most two of them share it, or lower parallel.pp",
        ),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(
    pool: Pool, tmp_path: Path, arguments: tuple[Any, ...], pp: int, message: str
) -> None:
    plan = plan_of(OWN, {"dp": 1, "pp": pp})
    assert pool.run(pp, own_model, plan, tmp_path, arguments) == [message] * pp
