"""Recomputation computes the same, keeps what it says, and is right where others are wrong: ZeRO-3, tp, I and W."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import GPT2, LLAMA, QWEN, compared, plan_of
from pool import Place, Pool
from torch import nn

from shardwright.data.samples import RandomSamples
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel import recompute as technique
from shardwright.parallel.compose import Runtime, compose
from shardwright.plan.plan import Plan
from shardwright.train.batches import rank_batch
from shardwright.train.ledger import StepMemory
from shardwright.train.step import train_step
from shardwright.verify.compare import BARS

pytestmark = pytest.mark.world

FAMILIES = {"llama": LLAMA, "qwen": QWEN, "gpt2": GPT2}
# family, dp, tp, pp, zero, schedule, virtual stages, tied, sequence parallel
CASES = [
    ("llama", 1, 1, 1, 0, "1f1b", 1, False, True),
    ("qwen", 2, 1, 1, 3, "1f1b", 1, True, True),
    ("gpt2", 1, 2, 1, 0, "1f1b", 1, True, False),
    ("qwen", 1, 3, 1, 0, "1f1b", 1, False, True),
    ("llama", 2, 2, 1, 3, "1f1b", 1, True, True),
    ("llama", 1, 2, 2, 0, "zb-h1", 1, True, True),
    ("qwen", 2, 1, 2, 3, "zbv", 2, True, True),
    ("gpt2", 2, 1, 2, 2, "interleaved", 2, False, True),
    ("llama", 2, 1, 2, 3, "zb-h1", 1, False, True),
    ("gpt2", 1, 2, 2, 1, "gpipe", 1, True, True),
]


def case_plan(case: tuple[Any, ...], **memory: Any) -> Plan:
    family, dp, tp, pp, zero, schedule, virtual, tied, sequence_parallel = case
    model = FAMILIES[family] | {"layers": 5, "kv_heads": 3, "tied_embeddings": tied}
    parallel = {"dp": dp, "tp": tp, "pp": pp, "zero": zero, "sequence_parallel": sequence_parallel}
    parallel |= {"pipeline_schedule": schedule, "virtual_stages": virtual}
    return plan_of(model, parallel, memory, global_batch_size=6 * dp, micro_batch_size=2)


@pytest.mark.parametrize("setting", [{"recompute": "full"}, {"recompute": "selective"}], ids=["full", "selective"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:7])))
def test_a_layout_computes_what_one_device_does(
    pool: Pool, tmp_path: Path, case: tuple[Any, ...], setting: dict[str, str]
) -> None:
    errors = compared(pool, case_plan(case, **setting), tmp_path)
    assert errors.missing is None
    assert all(error is None or error <= BARS["fp64"] for error in errors.errors().values()), errors


@pytest.mark.parametrize("setting", ["full", "selective"])
def test_chosen_layers_alone(pool: Pool, tmp_path: Path, setting: str) -> None:
    plan = case_plan(CASES[5], recompute=setting, recompute_layers=(1, 4))
    errors = compared(pool, plan, tmp_path)
    assert all(error is None or error <= BARS["fp64"] for error in errors.errors().values()), errors


def stale_values(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    """Computes again what a module gives, a little off."""
    make = technique._Derived.make
    patch.setattr(technique._Derived, "make", lambda self: make(self) * 1.001)


def test_a_wrong_recomputation_is_caught(pool: Pool, tmp_path: Path) -> None:
    errors = compared(pool, case_plan(CASES[4], recompute="selective"), tmp_path, stale_values)
    assert (errors.errors()["gradients"] or 0.0) > 1000 * BARS["fp64"]


# Memory


def peaks(place: Place, plan: Plan) -> tuple[int, int]:
    """In a rank: the most of activations in one step, estimated and measured."""
    from shardwright.plan.memory import estimated_memory

    runtime = compose(plan, place.mesh(plan.topology))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, 3)
    with StepMemory(runtime, optimizer) as memory:
        train_step(runtime, optimizer, rank_batch(runtime, samples, 0), 1e-3)
    assert memory.record is not None
    return estimated_memory(plan, place.rank).activations, memory.record.activations


WIDE = {"layers": 4, "hidden": 128, "heads": 4, "kv_heads": 2, "ffn": 352, "vocab": 257}
LONG: dict[str, Any] = {"sequence_length": 64, "micro_batch_size": 4, "dtype": "fp32"}


@pytest.mark.parametrize("parallel", [{}, {"tp": 2}, {"pp": 2}, {"pp": 2, "pipeline_schedule": "zb-h1"}, {"dp": 2}])
@pytest.mark.parametrize("setting", ["none", "selective", "full"])
def test_activations_are_the_estimate(pool: Pool, setting: str, parallel: dict[str, Any]) -> None:
    parallel = {"dp": 1, "zero": 3} | parallel
    plan = plan_of(WIDE, parallel, {"recompute": setting}, global_batch_size=16 * parallel["dp"], **LONG)
    for estimated, measured in pool.run(plan.world_size, peaks, plan):
        assert estimated == pytest.approx(measured, rel=0.03)


# A model of one's own


class Mixer(nn.Module):
    """A layer out of torch's own modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(24), nn.Linear(24, 40), nn.GELU()
        self.down = nn.Linear(40, 24)
        self.in_place = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(self.norm(x))
        y = self.act(hidden)
        if self.in_place:
            hidden.detach().add_(1.0)
        return x + self.down(y)


@pytest.mark.parametrize("setting", ["full", "selective"])
def test_torchs_own_modules(setting: str) -> None:
    torch.manual_seed(0)
    plain, layer = Mixer(), Mixer()
    layer.load_state_dict(plain.state_dict())
    technique.recompute([layer], setting, "all")
    x = torch.randn(8, 24)
    gradients = []
    for model in (plain, layer):
        own = x.clone().requires_grad_()
        model(own).square().sum().backward()
        gradients.append([own.grad, *(p.grad for p in model.parameters())])
    for expected, found in zip(*gradients, strict=True):
        assert torch.equal(expected, found)


def test_an_input_changed_in_place_is_told() -> None:
    layer = Mixer()
    technique.recompute([layer], "selective", "all")
    layer.in_place = True
    y = layer(torch.randn(8, 24, requires_grad=True))
    with pytest.raises(RuntimeError, match="the input of GELU was changed in place"):
        y.sum().backward()


def test_a_runtime_is_freed(pool: Pool) -> None:
    assert pool.run(2, is_freed, freed_plan()) == [True, True]


def freed_plan() -> Plan:
    return case_plan(("llama", 2, 1, 1, 3, "1f1b", 1, True, True), recompute="full")


def is_freed(place: Place, plan: Plan) -> bool:
    """In a rank: whether a runtime that has trained a step goes when nobody has it any more."""
    runtime = compose(plan, place.mesh(plan.topology))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, 3)
    train_step(runtime, optimizer, rank_batch(runtime, samples, 0), 1e-3)
    gone = weakref.ref(runtime.states.units[0])
    del runtime, optimizer
    gc.collect()
    return gone() is None


class Awkward(nn.Module):
    """Layers of one's own that change or cut what a cheap module made."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.norm, self.act = nn.LayerNorm(24), nn.SiLU()
        self.up, self.narrow = nn.Linear(24, 24), nn.Linear(12, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        if self.form == "added to":
            h += 1.0
            return x + self.up(h)
        if self.form == "masked":
            y = self.act(self.up(h))
            y[:, :3] = 0
            return x + self.up(y)
        if self.form == "cut":
            a, b = h.chunk(2, dim=-1)
            return x + self.narrow(self.act(a) * b)
        if self.form == "rows":
            return x[2:] + self.up(self.act(h[2:]))
        return x + torch.nn.functional.dropout(self.up(h), 0.5)


@pytest.mark.parametrize("form", ["added to", "masked", "cut", "rows", "random"])
@pytest.mark.parametrize("setting", ["full", "selective"])
def test_layers_that_change_or_cut_what_they_made(setting: str, form: str) -> None:
    torch.manual_seed(0)
    plain, layer = Awkward(form), Awkward(form)
    layer.load_state_dict(plain.state_dict())
    technique.recompute([layer], setting, "all")
    x, gradients = torch.randn(8, 24), []
    for model in (plain, layer):
        torch.manual_seed(1)
        own = x.clone().requires_grad_()
        model(own).square().sum().backward()
        gradients.append([own.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) > 3
    for expected, found in zip(*gradients, strict=True):
        assert torch.equal(expected, found)
