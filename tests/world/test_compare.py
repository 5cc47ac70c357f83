"""`shardwright compare`: every row is a real run, its bytes are those of the plan, and what is there is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.world

RECIPE = """
[model]
layers = 4
hidden = 32
heads = 4
ffn = 64
vocab = 97

[data]
corpus = "random"

[train]
sequence_length = 16
global_batch_size = 8
micro_batch_size = 2
dtype = "fp32"
steps = 100

[run]
device = "cpu"
"""
ONLY = ("one", "data", "zero-1", "zero-3", "pipeline-1f1b", "pipeline-zbv", "3d")


def compared(folder: Path, *more: str, rc: int = 0) -> subprocess.CompletedProcess[str]:
    (folder / "tiny.toml").write_text(RECIPE)
    command = [sys.executable, "-m", "shardwright", "compare", "tiny.toml", "--steps", "1", *more]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == rc, done.stderr
    return done


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("compare")
    only = [argument for name in ONLY for argument in ("--only", name)]
    return folder, json.loads(compared(folder, "--world", "2", "--json", *only).stdout)


def rows_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in document["rows"]}


def test_bytes_are_those_of_the_plan_and_of_the_zero_paper(document: tuple[Path, dict[str, Any]]) -> None:
    rows = rows_of(document[1])
    measured = {name: row for name, row in rows.items() if "reason" not in row}
    assert len(measured) == len(ONLY) - 1
    for row in measured.values():
        assert row["communication"]["exact"]
        assert row["proof"]["passed"] and row["proof"]["gradients"] < 1e-10
        assert row["seconds"] > 0

    def moved(name: str) -> int:
        """What gradients and parameters send, in one step."""
        groups = rows[name]["communication"]["by_group"]["measured"]
        return groups.get("gradients", 0) + groups.get("parameters", 0)

    plain = moved("data parallelism")
    assert moved("one device") == 0
    assert moved("ZeRO-1") == pytest.approx(plain, rel=0.01)  # padding
    # Two microbatches: ZeRO-3 gathers and reduces for each, but the head stays whole from its forward to its backward.
    assert 2.5 * plain < moved("ZeRO-3") <= 3 * plain * 1.01


def test_a_row_that_cannot_exist_says_why(document: tuple[Path, dict[str, Any]]) -> None:
    assert "at least 2 each" in rows_of(document[1])["3D"]["reason"]


def test_bubbles_and_derived_columns(document: tuple[Path, dict[str, Any]]) -> None:
    rows = rows_of(document[1])
    assert rows["data parallelism"]["bubble"] is None
    for name in ("pipeline, 1f1b", "pipeline, zbv"):
        bubble = rows[name]["bubble"]
        assert 0 < bubble["planned"] < 0.6 and 0 < bubble["measured"] < 1
        assert 0 < bubble["replayed_makespan"] <= bubble["makespan"]
    derived = {row["name"]: row for row in document[1]["derived"]}
    assert derived["one device"]["memory_efficiency"] == 1
    assert derived["data parallelism"]["memory_efficiency"] == pytest.approx(0.5, rel=0.1)
    assert derived["data parallelism"]["traffic"] == pytest.approx(1, rel=0.01)
    assert derived["ZeRO-3"]["largest"]["parameters"] > derived["data parallelism"]["largest"]["parameters"]
    assert derived["data parallelism"]["lines"] < derived["ZeRO-3"]["lines"]


def test_what_is_there_is_kept_and_the_table_is_printed(document: tuple[Path, dict[str, Any]]) -> None:
    folder, first = document
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs/compare-tiny/rows").glob("*.json")}
    done = compared(folder, "--world", "2", "--only", "one", "--only", "zero-1")
    assert "ZeRO-1" in done.stdout and "holds" in done.stdout
    for name in ("one-device", "zero-1"):
        path = folder / f"runs/compare-tiny/rows/{name}.json"
        assert path.stat().st_mtime_ns == before[path]
    kept = json.loads((folder / "runs/compare-tiny/comparison.json").read_text())
    assert rows_of(kept)["ZeRO-1"] == rows_of(first)["ZeRO-1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "zeppelin"), '--only: no technique is named "zeppelin"'),
        (("--world", "99"), "--world: 99 ranks on one machine"),
        (("--bytes", "many"), "--bytes"),
        (("--hardware", ""), '--hardware: no device is named ""'),
        (("--hardware", "abacus"), '--hardware: no device is named "abacus"'),
        (("--world", "2", "--only", "3d"), "--world: no technique can be had on 2 ranks"),
        (("--run-dir", "tiny.toml"), "--run-dir: tiny.toml cannot be written"),
    ],
)
def test_bad_input_gets_one_clear_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    assert f"error: {message}" in compared(tmp_path, *arguments, rc=2).stderr


def test_torchrun_is_told_once_that_compare_starts_its_own(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*torchrun, "shardwright", "compare", "tiny.toml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and not (tmp_path / "runs").exists()
    assert done.stderr.count("starts the ranks of each row itself, and torchrun has started 2") == 1
