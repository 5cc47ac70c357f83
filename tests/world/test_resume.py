"""`shardwright train --resume` as a user meets it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from test_train import here, rows, shardwright  # noqa: F401  (a fixture)

from shardwright.checkpoint.load import Checkpoint
from shardwright.cli import main as command
from shardwright.train.lock import RunLock

pytestmark = pytest.mark.world

SIX = ("train.steps=6", "checkpoint.every=2", "data.eval_every=2")


def tensors_of(run: Path) -> dict[str, bytes]:
    """The bytes of every tensor file of a run's newest checkpoint, but for the plan that the manifest has."""
    newest = Checkpoint.open(run).path
    return {path.name: path.read_bytes() for path in sorted(newest.glob("*.safetensors"))}


def without_times(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows(path)]


def test_a_run_that_was_ended_early_goes_on_to_the_bit(here: Path) -> None:  # noqa: F811
    assert shardwright("train", "r.toml", "--run-dir", "straight", *SIX).returncode == 0
    first = shardwright("train", "r.toml", "--run-dir", "two", *SIX, "train.stop_after=3")
    assert first.returncode == 0, first.stderr
    assert "checkpoints/step-00000003" in first.stderr
    # What a killed run leaves behind: rows after the checkpoint, one of them cut off, and a draft.
    with (here / "two" / "steps.jsonl").open("a") as file:
        file.write(json.dumps(rows(here / "two" / "steps.jsonl")[-1] | {"step": 4}) + '\n{"step": 5, "lo')
    (here / "two" / "checkpoints" / ".saving-00000004").mkdir()
    second = shardwright("train", "r.toml", "--run-dir", "two", *SIX, "--resume")
    assert second.returncode == 0, second.stderr
    assert "goes on from two/checkpoints/step-00000003 at step 3" in second.stderr
    assert "train.stop_after = 0, was 3" in second.stderr
    assert without_times(here / "two" / "steps.jsonl") == without_times(here / "straight" / "steps.jsonl")
    validated = [row["step"] for row in rows(here / "two" / "validation.jsonl")]
    assert validated == [0, 2, 3, 4, 6]  # 3 was once the end
    assert tensors_of(here / "two") == tensors_of(here / "straight")
    assert [path.name for path in sorted((here / "two" / "checkpoints").iterdir())] == [
        "step-00000004",
        "step-00000006",
    ]

    third = shardwright("train", "r.toml", "--run-dir", "two", *SIX, "--resume")
    assert third.returncode == 0 and "at step 6" in third.stderr
    assert len(rows(here / "two" / "steps.jsonl")) == 6


def test_it_goes_on_in_the_newest_run_on_another_layout_and_says_what_changed(here: Path) -> None:  # noqa: F811
    assert shardwright("train", "r.toml", *SIX, "train.stop_after=2").returncode == 0
    other = ("parallel.dp=1", "parallel.tp=2", "parallel.zero=0", "train.global_batch_size=4")
    done = shardwright("train", "r.toml", *SIX, *other, "--resume", "train.stop_after=4")
    assert done.returncode == 0, done.stderr
    for change in ("parallel.tp = 2, was 1", "parallel.zero = 0, was 2", "train.global_batch_size = 4, was 8"):
        assert change in done.stderr
    training = Checkpoint.open(here / "runs" / "r-1").manifest.training
    assert training is not None and (training.step, training.position) == (4, 2 * 8 + 2 * 4)
    assert not (here / "runs" / "r-2").exists()


def test_without_a_run_one_is_started(here: Path) -> None:  # noqa: F811
    done = shardwright("train", "r.toml", "--run-dir", "new", "--resume", "train.steps=2")
    assert done.returncode == 0, done.stderr
    assert "--resume: no run in new yet: this one starts from the beginning" in done.stderr


def test_what_cannot_go_on_is_refused_and_nothing_is_lost(here: Path) -> None:  # noqa: F811
    assert shardwright("train", "r.toml", "--run-dir", "a", *SIX, "train.stop_after=2").returncode == 0
    before = (here / "a" / "plan.json").read_bytes()
    for change, problem in {
        "model.hidden=64": "model.hidden: 64, and 32 in a",
        "model.tied_embeddings=true": "model.tied_embeddings: true, and false in a",
        "train.optimizer=sgd": 'train.optimizer: "sgd", and "adamw" in a',
    }.items():
        refused = shardwright("train", "r.toml", "--run-dir", "a", *SIX, "--resume", change)
        assert refused.returncode == 2 and problem in refused.stderr and "Traceback" not in refused.stderr
    assert (here / "a" / "plan.json").read_bytes() == before


def test_a_run_starts_from_the_weights_of_another(here: Path) -> None:  # noqa: F811
    assert shardwright("train", "r.toml", "--run-dir", "a", *SIX).returncode == 0
    (here / "b.toml").write_text((here / "r.toml").read_text().partition("[data]")[2].join(["[data]", ""]))
    text = (here / "b.toml").read_text()
    (here / "b.toml").write_text('[model]\ninit_from = "a"\n' + text)
    done = shardwright("train", "b.toml", "--run-dir", "b", "parallel.dp=1", "parallel.pp=2", "train.steps=2")
    assert done.returncode == 0, done.stderr
    first = rows(here / "b" / "validation.jsonl")[0]["loss"]
    assert first == pytest.approx(rows(here / "a" / "validation.jsonl")[-1]["loss"], rel=1e-5)
    # A run that goes on has its own weights: those it once began with may be gone.
    shutil.rmtree(here / "a")
    again = shardwright(
        "train", "b.toml", "--run-dir", "b", "parallel.dp=1", "parallel.pp=2", "train.steps=4", "--resume"
    )
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in rows(here / "b" / "steps.jsonl")] == [1, 2, 3, 4]


def test_a_directory_in_use_is_refused_and_left_alone(here: Path) -> None:  # noqa: F811
    assert shardwright("train", "r.toml", "--run-dir", "a", *SIX, "train.stop_after=2").returncode == 0
    plan, steps = (here / "a" / "plan.json").read_bytes(), (here / "a" / "steps.jsonl").read_bytes()
    lock = RunLock(here / "a")
    refused = shardwright("train", "r.toml", "--run-dir", "a", *SIX, "--resume")
    assert refused.returncode == 2 and f"--run-dir: a is in use by process {os.getpid()} on" in refused.stderr
    assert (plan, steps) == ((here / "a" / "plan.json").read_bytes(), (here / "a" / "steps.jsonl").read_bytes())
    lock.release()
    assert shardwright("train", "r.toml", "--run-dir", "a", *SIX, "--resume").returncode == 0


def test_what_was_saved_and_cannot_be_read_does_not_begin_anew(here: Path) -> None:  # noqa: F811
    assert shardwright("train", "r.toml", "--run-dir", "a", *SIX).returncode == 0
    steps = (here / "a" / "steps.jsonl").read_bytes()
    for manifest in (here / "a" / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    refused = shardwright("train", "r.toml", "--run-dir", "a", *SIX, "--resume", "run.max_restarts=2")
    assert refused.returncode == 1 and "none of 2 checkpoints is whole" in refused.stderr
    assert "starting all ranks anew" not in refused.stderr  # what a person has to mend would only come again
    assert (here / "a" / "steps.jsonl").read_bytes() == steps


def test_a_damaged_one_is_put_aside_and_its_place_taken(here: Path) -> None:  # noqa: F811
    assert shardwright("train", "r.toml", "--run-dir", "a", *SIX).returncode == 0
    newest = here / "a" / "checkpoints" / "step-00000006"
    (newest / "model" / "shardwright-tokenizer.json").write_text("junk")
    done = shardwright("train", "r.toml", "--run-dir", "a", *SIX, "--resume", "train.lr=1e-4")
    assert done.returncode == 0, done.stderr
    assert "step-00000006 is passed over" in done.stderr and "at step 4" in done.stderr
    kept = sorted(path.name for path in newest.parent.iterdir())
    assert kept == ["step-00000004", "step-00000006", "step-00000006.damaged-1"]
    assert [row["step"] for row in rows(here / "a" / "steps.jsonl")] == [1, 2, 3, 4, 5, 6]
    Checkpoint.open(newest).check()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["model.init_from=nowhere"], "model.init_from: nowhere: no such directory"),
        (["model.init_from=text"], "model.init_from: text: has neither manifest.json nor config.json"),
        (["checkpoint.every=-1"], "checkpoint.every"),
        (["checkpoint.keep=0"], "checkpoint.keep"),
        (['checkpoint.on_error="ignore"'], "checkpoint.on_error"),
    ],
)
def test_bad_input(
    here: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    problem: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["shardwright", "train", "r.toml", *arguments])
    with pytest.raises(SystemExit) as left:  # before any rank is started
        command.main()
    said = capsys.readouterr().err
    assert left.value.code == 2 and problem in said and said.startswith("error: ") and "Traceback" not in said
