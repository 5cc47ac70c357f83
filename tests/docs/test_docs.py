"""What the README and the docs show is what the repository does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.document import written
from shardwright.checkpoint.exchange.export import export
from shardwright.data.tokenizer import BytesTokenizer
from shardwright.nn.initial import Seeded
from shardwright.plan.resolve import resolve
from shardwright.spec.architecture import resolve_architecture
from shardwright.spec.load import load
from shardwright.spec.model import ModelSpec

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS_A_MODEL = ROOT / "recipes" / "finetune.toml"
RECIPES = sorted(set((ROOT / "recipes").glob("*.toml")) - {NEEDS_A_MODEL})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    for target in re.findall(r"`((?:tests|examples|recipes|benchmarks|tools)/[\w./-]+)`", page.read_text()):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_recipes_resolve(recipe: Path) -> None:
    spec = load(recipe)
    device = "cpu" if spec.run.device == "auto" else spec.run.device
    resolve(spec, world_size=None, device=device, native_bf16=True, tokenizer_vocab=spec.data.expected_vocab)


def test_commands_in_the_readme_exist() -> None:
    for command in re.findall(r"^(?:\.venv/bin/)?shardwright (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        subprocess.run([sys.executable, "-m", "shardwright", command, "--help"], check=True, capture_output=True)


def test_the_pages_show_the_example_as_it_is() -> None:
    assert (ROOT / "examples" / "own_loop.py").read_text() in (ROOT / "docs" / "api.md").read_text()


@pytest.mark.world
def test_the_example_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "own_loop.py")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 21 and losses[-1] < losses[0]


@pytest.mark.world
def test_fine_tuning_goes_as_its_page_says(tmp_path: Path) -> None:
    """A Hugging Face directory in, one of the same family out, and another loss on completions between them."""
    make_model(tmp_path / "models" / "base")
    lines = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}."} for i in range(400)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sizes = ["train.sequence_length=32", "train.global_batch_size=4", "train.steps=6", "parallel.dp=2"]
    more = ["train.lr=1e-2", "train.warmup_steps=0", "data.validation_fraction=0.1", "data.eval_batches=1"]
    environment = {**os.environ, "SHARDWRIGHT_CACHE": str(tmp_path / "cache")}

    def shardwright(*arguments: str) -> str:
        command = [sys.executable, "-m", "shardwright", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    shardwright("train", str(NEEDS_A_MODEL), *sizes, *more)
    said = shardwright("checkpoint", "export", "runs/finetune-1", "tuned")
    assert said.startswith("tuned: qwen3")
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert config["model_type"] == "qwen3" and config["my_own"] == 7
    assert (tmp_path / "tuned" / "tokenizer.json").read_bytes() == (
        tmp_path / "models" / "base" / "tokenizer.json"
    ).read_bytes()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "runs/finetune-1/validation.jsonl").open()]
    assert losses[-1] < losses[0] - 0.5


def make_model(path: Path) -> None:
    """A small random Qwen 3 in Hugging Face's form, with a key in its config that nobody here knows."""
    fields = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "qk_norm": True, "vocab": 257, "max_positions": 64}
    spec = ModelSpec.model_validate(fields)
    architecture = resolve_architecture(spec, sequence_length=64, tokenizer_vocab=None)
    companions = path.parent / "companions"
    companions.mkdir(parents=True)
    BytesTokenizer().save(companions)
    export(Seeded(0), architecture, path, companions=companions, base_config={"model_type": "qwen3", "my_own": 7})
    (path / "shardwright-tokenizer.json").unlink()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_of_records_are_those_of_the_records(page: Path) -> None:
    assert written(page.read_text()) == page.read_text(), "python -m benchmarks.document brings it up to date"
