"""Recipes and overrides: what loads, and what every mistake says."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from shardwright.errors import RecipeError
from shardwright.layout.mesh import AXES
from shardwright.spec.load import build, load
from shardwright.spec.parallel import ParallelSpec
from shardwright.spec.spec import Spec

MINIMAL = "[model]\nlayers = 2\nhidden = 64\nheads = 4\n\n[train]\nsteps = 3\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "quickstart.toml"
    path.write_text(MINIMAL)
    return path


def refusal(data: dict) -> str:
    with pytest.raises(RecipeError) as caught:
        build(data)
    return str(caught.value)


def one(field: str, value: object) -> str:
    """What a single wrong field says."""
    section, name = field.split(".")
    return refusal({"model": {}} | {section: {name: value}})


def test_minimal_recipe(recipe: Path) -> None:
    spec = load(recipe)
    assert (spec.model.layers, spec.train.steps, spec.train.lr) == (2, 3, 1e-3)
    assert (spec.parallel.dp, spec.parallel.pp, spec.parallel.zero, spec.parallel.virtual_stages) == ("auto", 1, 1, 1)


def test_spec_is_frozen_and_survives_json(recipe: Path) -> None:
    spec = load(recipe, ["parallel.stages=[5, 3]", "run.collective_timeout=90"])
    assert spec.parallel.stages == (5, 3)
    assert spec.run.collective_timeout_seconds == 90
    assert spec.run.grace_period_seconds == 30
    assert Spec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ValidationError):
        spec.train.steps = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_order_defaults_to_the_mesh() -> None:
    assert tuple(ParallelSpec().order.split(",")) == AXES


def test_overrides(recipe: Path) -> None:
    overrides = ["parallel.tp=2", "train.steps = 50", 'data.corpus=["a","b"]', "train.optimizer=sgd", "train.lr=1"]
    scaling = ["model.rope_scaling.factor=8", "model.rope_scaling.original_max_positions=64"]
    spec = load(recipe, [*overrides, *scaling, "train.lr=2e-3", "data.separator=a = b"])
    assert spec.model.rope_scaling is not None
    assert spec.model.rope_scaling.factor == 8
    assert (spec.parallel.tp, spec.train.steps, spec.train.optimizer, spec.train.lr) == (2, 50, "sgd", 2e-3)
    assert spec.data.corpus == ("a", "b")
    assert spec.data.separator == "a = b"


@pytest.mark.parametrize("override", ["train.steps", "=3", "train.=3", ".steps=3", ""])
def test_malformed_override(recipe: Path, override: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(recipe, [override])
    message = f'"{override}": not an override\n  write it like section.field=value, e.g. train.steps=50'
    assert str(caught.value) == message


def test_override_below_a_field(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.steps\.more: train\.steps is not a table"):
        load(recipe, ["train.steps.more=3"])


def test_override_of_unknown_field(recipe: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(recipe, ["parallel.tpp=2"])
    assert str(caught.value) == "parallel.tpp: no such field\n  did you mean parallel.tp?"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"paralel": {}}, "paralel: no such section\n  did you mean parallel?"),
        ({"steps": 3}, "steps: no such field\n  did you mean train.steps?"),
        ({"train": {"zero": 1}}, "train.zero: no such field\n  did you mean parallel.zero?"),
        ({"checkpoint": {"qqq": 1}}, "checkpoint.qqq: no such field\n  checkpoint has: every, keep, on_error"),
        (
            {"qqq": 1},
            "qqq: no such section\n  a recipe has: model, data, train, parallel, memory, checkpoint, run",
        ),
        ({"train": 5}, "train: 5 is not a table\n  write it as a table, [train]"),
    ],
)
def test_unknown_names(data: dict, message: str) -> None:
    assert refusal({"model": {}} | data) == message


def test_no_model() -> None:
    assert refusal({}) == "model: required, and not given\n  write it in [model]"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train.steps", "many", 'train.steps: "many" is not an integer\n  write it like train.steps = 150'),
        ("train.steps", 2.5, "train.steps: 2.5 is not an integer\n  write it like train.steps = 150"),
        ("train.steps", 0, "train.steps: 0 is out of range\n  it must be at least 1"),
        ("train.lr", "fast", 'train.lr: "fast" is not a number\n  write it like train.lr = 0.001'),
        ("train.lr", 0, "train.lr: 0 is out of range\n  it must be above 0"),
        ("train.lr", float("inf"), "train.lr: Infinity is not a finite number\n  write it like train.lr = 0.001"),
        ("train.min_lr_ratio", 2, "train.min_lr_ratio: 2 is out of range\n  it must be at most 1"),
        ("data.validation_fraction", 1.0, "data.validation_fraction: 1.0 is out of range\n  it must be below 1"),
        ("train.optimizer", "adam", 'train.optimizer: "adam" is not one of its choices\n  one of: "adamw", "sgd"'),
        ("train.betas", [0.9], "train.betas: [0.9] has the wrong length\n  write it like train.betas = [0.9, 0.95]"),
        (
            "train.betas",
            [0.9, 0.9, 0.9],
            "train.betas: [0.9, 0.9, 0.9] has the wrong length\n  write it like train.betas = [0.9, 0.95]",
        ),
        ("train.betas", 0.9, "train.betas: 0.9 is not a list\n  write it like train.betas = [0.9, 0.95]"),
        ("parallel.zero", 4, "parallel.zero: 4 is not one of its choices\n  one of: 0, 1, 2, 3"),
        ("parallel.dp", "x", 'parallel.dp: "x" is not an integer or "auto"\n  write it like parallel.dp = "auto"'),
        ("parallel.dp", 0, 'parallel.dp: 0 is out of range\n  it must be at least 1, or "auto"'),
        ("parallel.tp", True, "parallel.tp: true is not an integer\n  write it like parallel.tp = 1"),
        (
            "parallel.sequence_parallel",
            1,
            "parallel.sequence_parallel: 1 is not true or false\n  write it like parallel.sequence_parallel = true",
        ),
        (
            "parallel.stages",
            [1, "a"],
            'parallel.stages[1]: "a" is not an integer\n  write it like parallel.stages = "auto"',
        ),
        (
            "parallel.stages",
            [],
            'parallel.stages: [] has the wrong length\n  write it like parallel.stages = "auto"',
        ),
        ("data.corpus", [1], 'data.corpus[0]: 1 is not text\n  write it like data.corpus = "stdlib"'),
        (
            "model.layers",
            "x",
            'model.layers: "x" is not an integer\n  leave it out for its default, or see docs/recipes.md',
        ),
        ("model.norm", "x", 'model.norm: "x" is not one of its choices\n  one of: "rmsnorm", "layernorm"'),
        (
            "model.rope_scaling",
            3,
            "model.rope_scaling: 3 is not a table\n  write it as a table, [model.rope_scaling]",
        ),
        (
            "model.rope_scaling",
            {"factor": 8.0},
            "model.rope_scaling.original_max_positions: required, and not given\n  write it in [model.rope_scaling]",
        ),
        (
            "model.rope_scaling",
            {"factor": 8.0, "original_max_positions": 64, "high_freq_factor": 1.0},
            "model.rope_scaling: high_freq_factor = 1 is not above low_freq_factor = 1\n"
            "  Llama 3 has high_freq_factor = 4.0 and low_freq_factor = 1.0",
        ),
        ("memory.offload_chunk", "big", "memory.offload_chunk: 'big' is not a quantity\n  write it like \"64 MiB\""),
        ("memory.host_limit", "big", "memory.host_limit: 'big' is not a quantity\n  write it like \"64 MiB\""),
        ("run.grace_period", "soon", "run.grace_period: 'soon' is not a quantity\n  write it like \"10 min\""),
    ],
)
def test_wrong_values(field: str, value: object, message: str) -> None:
    assert one(field, value) == message


def test_several_problems_at_once_are_all_told() -> None:
    message = refusal({"model": {}, "parallel": {"tpp": 2, "zero": 9}, "train": {"steps": "many"}})
    assert message.splitlines() == [
        'train.steps: "many" is not an integer',
        "  write it like train.steps = 150",
        "parallel.zero: 9 is not one of its choices",
        "  one of: 0, 1, 2, 3",
        "parallel.tpp: no such field",
        "  did you mean parallel.tp?",
    ]


def test_not_toml(recipe: Path) -> None:
    recipe.write_text("[model]\nlayers 2\n")
    with pytest.raises(RecipeError) as caught:
        load(recipe)
    assert str(caught.value).startswith(f"{recipe}, line 2: not TOML: ")
    assert str(caught.value).endswith("\n  the line reads: layers 2")


@pytest.mark.parametrize("text", ["", "[model]\nlayers ="])
def test_broken_at_the_end(recipe: Path, text: str) -> None:
    recipe.write_text(text)
    with pytest.raises(RecipeError, match=r"line 2: not TOML" if text else "model: required"):
        load(recipe)


def test_missing_recipe_names_the_nearest(recipe: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(recipe.with_name("quickstrt.toml"))
    assert str(caught.value) == f"{recipe.with_name('quickstrt.toml')}: no such recipe\n  did you mean {recipe}?"


def test_missing_recipe_lists_what_is_there(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    with pytest.raises(RecipeError, match=r"zzz: no such recipe\n  recipes here: quickstart\.toml"):
        load("zzz")
    recipe.unlink()
    with pytest.raises(RecipeError, match=r"zzz: no such recipe\n  give the path of a \.toml file"):
        load("zzz")


def test_unreadable_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load(tmp_path)
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="cannot be read: not UTF-8 text"):
        load(tmp_path / "a.toml")
