"""Tensor parallelism computes what one device computes; what is broken on purpose is seen; its collectives are few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import GPT2, LLAMA, QWEN, QWEN2, STEPS, Fault, compared, plan_of
from pool import Place, Pool

from shardwright.cost.shapes import keeps_logit_gradients
from shardwright.errors import LayoutError
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import Runtime, compose
from shardwright.parallel.tensor import linear, vocabulary
from shardwright.parallel.tensor.region import Region
from shardwright.parallel.tensor.rules import Colwise, Rule
from shardwright.parallel.zero import unit as units
from shardwright.plan.memory import estimated_memory
from shardwright.plan.plan import Plan
from shardwright.train.ledger import measured_memory
from shardwright.verify.compare import BARS, KINDS, compare
from shardwright.verify.trace import read_traces, trace_layout, write_trace

pytestmark = pytest.mark.world

CASES = [
    (LLAMA | {"kv_heads": 12}, {"dp": 1, "tp": 2, "zero": 0}),
    (LLAMA | {"kv_heads": 4}, {"dp": 2, "tp": 2, "zero": 1}),
    (LLAMA | {"kv_heads": 3}, {"dp": 1, "tp": 2, "zero": 2}),
    (LLAMA | {"kv_heads": 3}, {"dp": 1, "tp": 4, "zero": 3}),
    (LLAMA | {"kv_heads": 2, "tied_embeddings": True}, {"dp": 1, "tp": 3, "zero": 1}),
    (LLAMA | {"kv_heads": 1, "tied_embeddings": True}, {"dp": 1, "tp": 4, "zero": 2}),
    (LLAMA | {"kv_heads": 2, "tied_embeddings": True}, {"dp": 2, "tp": 2, "zero": 3, "dp_shard": 1}),
    (QWEN | {"kv_heads": 4}, {"dp": 1, "tp": 2, "zero": 3}),
    (QWEN2 | {"kv_heads": 4}, {"dp": 2, "tp": 2, "zero": 1}),
    (LLAMA | {"kv_heads": 6, "bias": True}, {"dp": 1, "tp": 2, "zero": 2}),
    (QWEN | {"kv_heads": 2}, {"dp": 1, "tp": 4, "zero": 1}),
    (QWEN | {"kv_heads": 1, "tied_embeddings": True}, {"dp": 2, "tp": 2, "zero": 3}),
    (GPT2 | {"kv_heads": 12}, {"dp": 2, "tp": 2, "zero": 2, "zero_pipeline": "save_communication"}),
    (GPT2 | {"kv_heads": 12, "tied_embeddings": True}, {"dp": 1, "tp": 3, "zero": 3}),
    (GPT2 | {"kv_heads": 3}, {"dp": 1, "tp": 4, "zero": 0}),
    (LLAMA | {"kv_heads": 4}, {"dp": 2, "tp": 2, "zero": 3, "order": "tp,replicate,pp,shard"}),
    (LLAMA | {"kv_heads": 6}, {"dp": 1, "tp": 1, "zero": 1}),
]


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "allreduce"])
@pytest.mark.parametrize(("model", "parallel"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_a_layout_computes_what_one_device_computes(
    pool: Pool, tmp_path: Path, model: dict[str, Any], parallel: dict[str, Any], sequence_parallel: bool
) -> None:
    plan = plan_of(model, parallel | {"sequence_parallel": sequence_parallel})
    found = compared(pool, plan, tmp_path)
    assert found.missing is None
    assert found.first_difference is None, found.first_difference


def test_fp32_under_sgd(pool: Pool, tmp_path: Path) -> None:
    plan = plan_of(QWEN | {"kv_heads": 4}, {"dp": 2, "tp": 2, "zero": 2}, dtype="fp32", optimizer="sgd")
    found = compared(pool, plan, tmp_path)
    assert found.parameters is not None and found.first_difference is None, found.first_difference


# Faults


def norm_gradients_not_summed(_runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    reduce = units.all_reduce

    class Skipped:
        def wait(self) -> None:
            pass

    patch.setattr(
        units,
        "all_reduce",
        lambda t, a, *, reason: Skipped() if "replicated" in reason else reduce(t, a, reason=reason),
    )


def log_tp_in_the_loss(_runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """What a cross-entropy gives that was handed logits of the whole vocabulary by every rank."""
    exchange = vocabulary._exchange

    def wrong(mine: torch.Tensor, region: Any) -> tuple[torch.Tensor, torch.Tensor]:
        log_sum, at_target = exchange(mine, region)
        return log_sum + torch.log(torch.tensor(float(region.axis.degree))), at_target

    patch.setattr(vocabulary, "_exchange", wrong)


def shared_heads_counted_twice(_runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    reduce = linear.all_reduce

    def doubled(tensor: torch.Tensor, axis: Any, *, reason: str) -> Any:
        handle = reduce(tensor, axis, reason=reason)
        handle.wait()
        tensor.mul_(2)
        return handle

    patch.setattr(linear, "all_reduce", doubled)


def replicated_elements_counted_by_every_rank(runtime: Runtime, _patch: pytest.MonkeyPatch) -> None:
    for unit in runtime.states.units:
        vars(unit.layout)["counted"] = ((0, unit.layout.length),)


def padding_in_the_norm(runtime: Runtime, _patch: pytest.MonkeyPatch) -> None:
    """Gaps of the flat gradient hold something, and the norm counts it."""
    for unit in runtime.states.units:
        make = unit._new_gradient

        def leaking(make: Callable[[], torch.Tensor] = make, unit: Any = unit) -> torch.Tensor:
            gradient = make()
            for begin, end in unit.layout.gaps:
                gradient[begin:end].fill_(0.01)
            return gradient

        unit._new_gradient = leaking
        if unit._whole_gradient is not None:
            unit._whole_gradient.copy_(leaking())


@pytest.mark.parametrize(
    ("fault", "kv_heads"),
    [
        (norm_gradients_not_summed, 4),
        (log_tp_in_the_loss, 4),
        (shared_heads_counted_twice, 1),
        (replicated_elements_counted_by_every_rank, 4),
        (padding_in_the_norm, 4),
    ],
)
def test_a_fault_is_seen_a_thousandfold(pool: Pool, tmp_path: Path, fault: Fault, kv_heads: int) -> None:
    plan = plan_of(QWEN | {"kv_heads": kv_heads}, {"dp": 1, "tp": 2, "zero": 1}, optimizer="sgd")
    found = compared(pool, plan, tmp_path, fault)
    assert found.first_difference is not None
    assert max(found.loss, found.gradients, found.parameters or 0) > 1000 * BARS["fp64"]


# Collectives


def traffic(place: Place, plan: Plan) -> tuple[Counter[str], Counter[str]]:
    """In a rank: calls and bytes along `tp` in one step, by verb and reason."""
    mesh = place.mesh(plan.topology)
    runtime = compose(plan, mesh)
    mesh.ledger.clear()
    trace_layout(plan, mesh, 1, runtime)
    rows = [(key, row) for key, row in mesh.ledger.rows.items() if key[1] == "tp"]
    calls = Counter({f"{verb} {reason}": row.calls for (verb, _, reason), row in rows})
    return calls, Counter({f"{verb} {reason}": row.sent for (verb, _, reason), row in rows})


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "allreduce"])
def test_collectives_are_at_layer_boundaries_only(pool: Pool, sequence_parallel: bool) -> None:
    model = LLAMA | {"kv_heads": 4}
    plan = plan_of(
        model, {"dp": 1, "tp": 2, "sequence_parallel": sequence_parallel}, sequence_length=12, micro_batch_size=12
    )
    calls, sent = pool.run(2, traffic, plan)[0]
    layers, activation = model["layers"], 12 * 12 * model["hidden"] * 8  # bytes of one microbatch between products
    if sequence_parallel:
        # Two pairs of products in a layer: gather before and reduce-scatter after each, and the same backward.
        expected = {
            "all_gather tensor/colwise": 2 * layers,
            "reduce_scatter tensor/colwise/backward": 2 * layers,
            "reduce_scatter tensor/rowwise": 2 * layers,
            "all_gather tensor/rowwise/backward": 2 * layers,
            "reduce_scatter tensor/embedding": 1,
            "all_gather tensor/embedding/backward": 1,
            "all_gather tensor/output": 1,
            "reduce_scatter tensor/output/backward": 1,
            "all_gather tensor/loss": 1,
            "all_reduce tensor/replicated": layers + 1,
        }
    else:
        expected = {
            "all_reduce tensor/colwise/backward": 2 * layers,
            "all_reduce tensor/rowwise": 2 * layers,
            "all_reduce tensor/embedding": 1,
            "all_reduce tensor/output/backward": 1,
            "all_gather tensor/loss": 1,
        }
    assert calls == Counter(expected)
    # Both forms send the same bytes of activations: an all-reduce is a reduce-scatter and an all-gather.
    activations = sum(n for key, n in sent.items() if "wise" in key)
    assert activations == 4 * layers * activation


def built(place: Place, plan: Plan) -> int:
    """In a rank: the largest number of elements of a parameter that it has."""
    runtime = compose(plan, place.mesh(plan.topology))
    return max(unit.layout.numel for unit in runtime.states.units)


def test_the_vocabulary_is_divided(pool: Pool) -> None:
    plan = plan_of(LLAMA | {"kv_heads": 4}, {"dp": 1, "tp": 4, "zero": 0})
    sizes = pool.run(4, built, plan)
    assert [size // 24 for size in sizes] == [127 + 1, 127 + 1, 127 + 1, 128 + 1]  # and the final norm


def output_gradients(place: Place, plan: Plan, tokens: int) -> float:
    """In a rank: the error of the output's gradients in bf16, relative, on this rank's words."""
    axis = place.mesh(plan.topology).tp
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(n, 24, generator=generator, dtype=torch.float64) for n in (tokens, 30))
    targets, own = torch.randint(30, (tokens, 1), generator=generator), slice(15 * axis.index, 15 * axis.index + 15)
    exact = [t.clone().requires_grad_() for t in (x, weight)]
    torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets.flatten(), reduction="sum").backward()
    low = [t.bfloat16().requires_grad_() for t in (x.unsqueeze(1), weight[own])]
    arguments = (targets.flatten(), own.start, Region(axis, False), vocabulary.LossKernels(), 5, None, True)
    vocabulary._VocabularyCrossEntropy.apply(*low, *arguments).backward()  # pyright: ignore[reportOptionalMemberAccess]
    expected = exact[0].grad.unsqueeze(1), exact[1].grad[own]  # pyright: ignore[reportOptionalMemberAccess, reportOptionalSubscript]
    pairs = zip(low, expected, strict=True)
    return max(float((got.grad.double() - e).norm() / e.norm()) for got, e in pairs)  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("tokens", [48, 49], ids=["kept", "summed"])
def test_the_outputs_gradients_in_bf16(pool: Pool, tokens: int) -> None:
    """Of few tokens the gradients of all logits are kept for one product; of more, chunks are summed in fp32."""
    assert keeps_logit_gradients(tokens, 5, 24, 2, 4) == (tokens == 48)
    plan = plan_of(LLAMA | {"kv_heads": 4}, {"dp": 1, "tp": 2, "zero": 0})
    assert max(pool.run(2, output_gradients, plan, tokens)) < 0.02


def own_model(place: Place, plan: Plan, folder: Path, divided: bool) -> None:
    """In a rank: the model of examples/own_model.py, on this layout."""
    import runpy

    made = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "own_model.py"))["OwnModel"]
    model = made(vocab=61, hidden=16, heads=4, layers=2)
    if not divided:
        type(model).tensor_table = None
    mesh = place.mesh(plan.topology)
    write_trace(folder, mesh.rank, trace_layout(plan, mesh, STEPS, compose(plan, mesh, model)))


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "allreduce"])
def test_a_users_own_model_is_the_same_on_two_ranks_as_on_one(
    pool: Pool, tmp_path: Path, sequence_parallel: bool
) -> None:
    model = {"layers": 2, "hidden": 16, "heads": 4, "ffn": 64, "vocab": 61}
    one = plan_of(model, {"dp": 1, "tp": 1})
    two = plan_of(model, {"dp": 2, "tp": 2, "zero": 2, "sequence_parallel": sequence_parallel})
    for plan in (one, two):
        (tmp_path / str(plan.world_size)).mkdir()
        pool.run(plan.world_size, own_model, plan, tmp_path / str(plan.world_size), True)
    (reference,) = read_traces(tmp_path / "1", 1)
    found = compare(read_traces(tmp_path / "4", 4), reference, two, STEPS, {kind: BARS["fp64"] for kind in KINDS})
    assert found.missing is None and found.first_difference is None, found.first_difference


def undivided(place: Place, plan: Plan) -> str:
    """In a rank: what a model without a table is told."""
    try:
        compose(plan, place.mesh(plan.topology), torch.nn.Linear(2, 2))
    except LayoutError as error:
        return str(error)
    return ""


def test_a_model_without_a_table_is_refused(pool: Pool) -> None:
    plan = plan_of(LLAMA | {"kv_heads": 4}, {"dp": 1, "tp": 2})
    (told, _) = pool.run(2, undivided, plan)
    assert "Linear has no tensor_table()" in told and "set tp = 1" in told


class Narrow(torch.nn.Module):
    """A model of one's own with fewer features than the plan's."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(8, 3)

    def tensor_table(self) -> dict[str, Rule]:
        return {"up": Colwise()}


def too_narrow(place: Place, plan: Plan) -> str:
    """In a rank: what a layout with more ranks than features is told."""
    try:
        compose(plan, place.mesh(plan.topology), Narrow())
    except LayoutError as error:
        return str(error)
    return ""


def test_more_ranks_than_features_is_refused(pool: Pool) -> None:
    plan = plan_of(LLAMA | {"kv_heads": 4}, {"dp": 1, "tp": 4})
    assert "parallel.tp: 4 is more than the 3 outputs of up" in pool.run(4, too_narrow, plan)[0]


def ledger(place: Place, plan: Plan) -> tuple[int, int]:
    """In a rank: bytes of state, estimated and measured."""
    runtime = compose(plan, place.mesh(plan.topology))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    measured = measured_memory(runtime, optimizer, transient=False)
    return estimated_memory(plan, runtime.mesh.rank).total, measured.total


@pytest.mark.parametrize("family", [LLAMA, QWEN, GPT2], ids=["llama", "qwen", "gpt2"])
@pytest.mark.parametrize(("tp", "kv_heads"), [(1, 4), (2, 3), (3, 4), (4, 1)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_ledger_is_what_the_formula_says(
    pool: Pool, family: dict[str, Any], tp: int, kv_heads: int, tied: bool
) -> None:
    plan = plan_of(family | {"kv_heads": kv_heads, "tied_embeddings": tied}, {"dp": 1, "tp": tp, "zero": 1})
    for estimated, measured in pool.run(tp, ledger, plan):
        assert estimated == measured
