"""Help answers at once and imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from shardwright import __version__
from shardwright.cli.main import app

HEAVY = ("torch", "numpy", "tokenizers", "safetensors", "shardwright.spec")
PROBE = f"""
import sys
from shardwright.cli.main import app
sys.argv = ["shardwright", *sys.argv[1:]]
try:
    app()
finally:
    print("heavy:", [name for name in {HEAVY} if name in sys.modules])
"""


@pytest.mark.parametrize("command", [[], ["plan"], ["train"], ["verify"], ["data"], ["data", "prepare"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, *command, "--help"], capture_output=True, text=True, check=True)
    assert "Usage: shardwright" in done.stdout
    assert done.stdout.rstrip().endswith("heavy: []")


def test_main_help_does_without_pydantic() -> None:
    """typer itself loads it for the arguments of a command, so only the first help can do without."""
    probe = PROBE.replace(str(HEAVY), "('pydantic',)")
    done = subprocess.run([sys.executable, "-c", probe, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("heavy: []")


def test_help_answers_in_time() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "shardwright", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.4


@pytest.mark.parametrize("command", [[], ["plan"], ["train"], ["verify"], ["data", "prepare"]])
def test_help_shows_an_example(command: list[str]) -> None:
    done = CliRunner().invoke(app, [*command, "--help"])
    assert done.exit_code == 0
    assert "Example: shardwright " in done.stdout


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"shardwright {__version__}\n"
