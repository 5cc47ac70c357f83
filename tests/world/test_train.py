"""`shardwright train` and `verify` as a user meets them: whole runs in processes of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.world

RECIPE = """
[model]
layers = 2
hidden = 32
heads = 2
ffn = 48

[data]
corpus = "text"
validation_fraction = 0.2
eval_every = 3
eval_batches = 2

[train]
steps = 5
sequence_length = 16
global_batch_size = 8
micro_batch_size = 2
warmup_steps = 1
dtype = "fp32"

[parallel]
dp = 2
zero = 2
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe and some text."""
    (tmp_path / "r.toml").write_text(RECIPE)
    (tmp_path / "text").mkdir()
    for i in range(8):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document {i}: " + "a line of text to learn from\n" * 40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHARDWRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def shardwright(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shardwright", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_a_complete_directory_and_runs_the_same_twice(here: Path) -> None:
    first = shardwright("train", "r.toml")
    assert first.returncode == 0, first.stderr
    run = here / "runs" / "r-1"
    steps = rows(run / "steps.jsonl")
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5]
    assert {"loss", "grad_norm", "lr", "num_tokens", "seconds", "tokens_per_second", "mfu"} <= set(steps[0])
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert "unknown" in steps[0]["mfu"]
    assert [row["step"] for row in rows(run / "validation.jsonl")] == [0, 3, 5]
    for rank in (0, 1):
        ledger = json.loads((run / "ranks" / f"{rank}.json").read_text())
        measured, estimated = ledger["memory"]["measured"], ledger["memory"]["estimated"]
        assert abs(measured["total"] - measured["padding"] - estimated["total"]) <= 8
        assert {row["reason"] for row in ledger["communication"]["measured"]} >= {"zero/reduce", "zero/publish"}
    assert "validation loss" in first.stderr and "estimated" in first.stderr and "runs/r-1" in first.stderr

    second = shardwright("train", "r.toml", "--run-dir", "again")
    assert second.returncode == 0, second.stderr
    assert [row["loss"] for row in rows(here / "again" / "steps.jsonl")] == [row["loss"] for row in steps]
    assert rows(here / "again" / "validation.jsonl")[-1]["loss"] == rows(run / "validation.jsonl")[-1]["loss"]

    refused = shardwright("train", "r.toml", "--run-dir", "again")
    assert refused.returncode == 2
    assert "again already holds a run" in refused.stderr and "--resume" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "problem", "way_out"),
    [
        (["data.corpus=nowhere"], "data.corpus: ", "nowhere"),
        (["data.corpus=empty"], "data.corpus: ", "empty"),
        (["train.sequence_length=100000"], "train.sequence_length + 1 = 100001", "give"),
        (["data.tokenizer=r.toml"], "data.tokenizer", "tokenizer.json"),
        (["model.vocab=100"], "model.vocab: 100 is smaller than the tokenizer's 257", "or leave it out"),
        (["--run-dir", "r.toml/x"], "--run-dir: r.toml/x cannot be written", "another --run-dir"),
        (["train.global_batch_size=10"], "train.global_batch_size: 10", "8 or 12"),
        (["parallel.tpp=2"], "parallel.tpp: no such field", "parallel.tp"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(here: Path, arguments: list[str], problem: str, way_out: str) -> None:
    (here / "empty").mkdir()
    refused = shardwright("train", "r.toml", *arguments)
    assert refused.returncode == 2
    assert problem in refused.stderr and way_out in refused.stderr
    assert "Traceback" not in refused.stderr
    assert refused.stderr.count("error:") == 1
    assert not (here / "runs").exists()


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "shardwright", "train", "r.toml", "train.steps=100000", "data.eval_every=0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_steps(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or len(path.read_text().splitlines()) < 3:
        assert time.monotonic() < deadline, "no steps were written"
        time.sleep(0.1)


def ranks_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in children if b"comm.rank" in Path(f"/proc/{c}/cmdline").read_bytes()]


def test_a_stop_request_ends_the_run_after_a_step(here: Path) -> None:
    process = start()
    wait_for_steps(here / "runs" / "r-1" / "steps.jsonl")
    os.kill(process.pid, signal.SIGINT)
    _, text = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped by SIGINT" in text and "Traceback" not in text


def test_a_killed_rank_ends_the_run_and_is_named(here: Path) -> None:
    process = start()
    wait_for_steps(here / "runs" / "r-1" / "steps.jsonl")
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    began = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    _, text = process.communicate(timeout=30)
    assert time.monotonic() - began < 15
    assert process.returncode == 1
    assert len(re.findall(r"rank \d was killed by signal 9", text)) == 1 and "Traceback" not in text
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_a_run_that_diverges_says_so(here: Path) -> None:
    failed = shardwright("train", "r.toml", "train.lr=1e30", "train.max_nonfinite_steps=2", "train.steps=40")
    assert failed.returncode == 1
    assert "train.max_nonfinite_steps: 2 steps in a row" in failed.stderr and "lower train.lr" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_verify_prints_one_json_document(here: Path) -> None:
    proved = shardwright("verify", "r.toml", "--steps", "2", "--json", "parallel.zero=3")
    assert proved.returncode == 0, proved.stderr
    document = json.loads(proved.stdout)
    assert document["passed"] and document["dtype"] == "fp32" and document["steps"] == 2
    assert document["loss"]["max_error"] <= document["bar"] == 5e-6
    assert document["gate"]["dtype"] == "fp64" and document["gate"]["parameters"]["max_error"] <= 1e-10
    assert document["first_difference"] is None and document["layout"].startswith("2 ranks")
