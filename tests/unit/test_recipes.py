"""The recipes of published layouts: sizes, worlds, and what `plan` says of the hardware that their authors had."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from shardwright.cost.hardware import hardware_named
from shardwright.plan.fit import Fit, fit, fullest_by_stage
from shardwright.plan.flops import flops_of
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.spec.load import load
from shardwright.spec.spec import Spec

RECIPES = Path(__file__).parents[2] / "recipes"
GIB = 2**30


@dataclass(frozen=True)
class Published:
    """What a paper says of a layout, and what is estimated here of the fullest rank."""

    recipe: str
    hardware: str
    billions: float
    world: int
    microbatches: int
    stages: tuple[int, int, int]  # how many; layers of the first and of the second
    needs_gib: float


PUBLISHED = (
    Published("megatron-turing-530b", "A100-80GB", 529.6, 2240, 240, (35, 3, 3), 23.8),
    Published("gpt-1t", "A100-80GB", 1008.0, 3072, 512, (64, 2, 2), 50.3),
    Published("llama-3.1-405b", "H100-SXM", 405.9, 16384, 16, (64, 1, 2), 128.8),
)


def planned(spec: Spec) -> Plan:
    return resolve(spec, world_size=None, device="cuda", native_bf16=True, tokenizer_vocab=None, local_size=8)


def fitted(plan: Plan, hardware: str) -> Fit:
    row = hardware_named(hardware)
    return fit(plan, row.usable, row.gpus_per_node, planned)


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.recipe)
def test_it_is_what_the_paper_says(published: Published) -> None:
    spec = load(RECIPES / f"{published.recipe}.toml")
    assert spec.run.device == "cuda" and spec.data.corpus == "random"
    plan = planned(spec)
    assert plan.architecture.num_parameters / 1e9 == pytest.approx(published.billions, rel=2e-3)
    assert (plan.world_size, plan.num_microbatches) == (published.world, published.microbatches)
    stages = plan.layers_per_stage
    assert (len(stages), stages[0], stages[1]) == published.stages
    assert "parallel.tp" not in " ".join(plan.warnings)  # tensor parallelism stays inside a node of eight


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.recipe)
def test_its_memory_beside_the_authors_hardware(published: Published) -> None:
    plan = planned(load(RECIPES / f"{published.recipe}.toml"))
    found = fitted(plan, published.hardware)
    assert found.needed / GIB == pytest.approx(published.needs_gib, rel=5e-3)
    assert found.fits == (published.needs_gib < 79)


def test_the_whole_state_of_the_530b_model_is_what_its_paper_counts_but_for_gradients() -> None:
    """The paper counts 20 bytes a parameter, bf16 gradients beside fp32 ones among them; here there are 18."""
    spec = load(RECIPES / "megatron-turing-530b.toml", ["parallel.zero=0"])
    middle = fullest_by_stage(planned(spec))[17]
    layers = 3 * planned(spec).architecture.layer_matrix_parameters / 8
    assert middle.total / layers == pytest.approx(18, rel=1e-3)
    assert fitted(planned(spec), "A100-80GB").fits


def test_llama_does_not_fit_because_gathered_inputs_are_kept_and_fits_without_them() -> None:
    """Of each layer and microbatch two products' inputs are kept, of all positions and not of an eighth of them."""
    plan = planned(load(RECIPES / "llama-3.1-405b.toml"))
    found = fitted(plan, "H100-SXM")
    assert found.changes[0].fields == {"memory.recompute": "selective"}
    assert found.changes[0].peak < 60 * GIB
    a, live = plan.architecture, 16 * 8  # layers of a rank times microbatches
    gathered = live * 2 * plan.sequence_length * a.hidden * 2 * 7 / 8
    assert 70 * GIB < found.needed - gathered < hardware_named("H100-SXM").usable


def test_model_flops_of_the_trillion_are_those_of_the_paper_s_formula() -> None:
    """Equation 3 of arXiv 2104.04473 counts a whole forward again: 96 for 72; here the last product is not repeated."""
    plan = planned(load(RECIPES / "gpt-1t.toml"))
    a, flops = plan.architecture, flops_of(plan)
    layers, hidden, s = a.layers, a.hidden, plan.sequence_length
    paper = 96 * layers * hidden**2 * (1 + s / (6 * hidden) + a.vocab / (16 * layers * hidden))
    assert flops.model_per_token == pytest.approx(paper * 72 / 96, rel=2e-3)
    assert flops.hardware_per_token == pytest.approx(paper - 8 * layers * hidden**2, rel=2e-3)


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.recipe)
def test_planning_takes_no_time(published: Published) -> None:
    start = time.process_time()
    fitted(planned(load(RECIPES / f"{published.recipe}.toml")), published.hardware)
    assert time.process_time() - start < 5  # 0.3 s on an idle core
