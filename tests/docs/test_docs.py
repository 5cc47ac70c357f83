"""What the README and the docs show is what the repository does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.plan.resolve import resolve
from shardwright.spec.load import load

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


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
