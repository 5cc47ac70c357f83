"""What trackers are told, that they write files alone, and that one that fails ends no run."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shardwright.cli import main as command
from shardwright.errors import RecipeError, RunError
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.record.records import StepRecord, ValidationRecord
from shardwright.spec.load import build
from shardwright.train.trackers import Trackers, check_installed
from shardwright.units import Seconds

FULL = OSError(errno.ENOSPC, "No space left on device")


def plan_with(*trackers: str) -> Plan:
    spec = build({"model": {"preset": "tiny"}, "run": {"trackers": list(trackers)}})
    return resolve(spec, world_size=1, device="cpu", native_bf16=False, tokenizer_vocab=256)


def step(number: int, mfu: float | str = 0.25) -> StepRecord:
    return StepRecord(number, 5.0 - number, 1.5, 1e-3, 512, 512, Seconds(0.5), 1024.0, mfu, True)


def validation(number: int) -> ValidationRecord:
    return ValidationRecord(number, 6.0 - number, 512, Seconds(0.1))


class FakeWandB(ModuleType):
    """The part of the package that a run uses; remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None, origin="here")
        self.asked: dict[str, Any] = {}
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.ended: list[int] = []
        self.failure: Exception | None = None

    def Settings(self, **settings: object) -> dict[str, object]:
        return settings

    def init(self, **asked: Any) -> FakeWandB:
        self.asked = asked
        return self

    def log(self, row: dict[str, float], step: int) -> None:
        if self.failure is not None:
            raise self.failure
        self.rows.append((step, row))

    def finish(self, exit_code: int) -> None:
        self.ended.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandB:
    for name in ("WANDB_MODE", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(name, "online")  # so that what a tracker sets is taken back
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda name: monkeypatch.setitem(sys.modules, name, None)


def test_wandb_is_told_everything_offline(tmp_path: Path, wandb: FakeWandB) -> None:
    told: list[str] = []
    plan = plan_with("wandb")
    with Trackers(plan, tmp_path, 0, told.append) as trackers:
        trackers.on_validation(validation(0))
        trackers.on_step(step(1))
        trackers.on_step(step(2, mfu='unknown (no peak rate for "CPU")'))
    numbers = {"train/loss": 4.0, "train/grad_norm": 1.5, "train/lr": 1e-3, "train/tokens_per_second": 1024.0}
    assert wandb.rows == [
        (0, {"validation/loss": 6.0}),
        (1, {**numbers, "train/mfu": 0.25}),
        (2, {**numbers, "train/loss": 3.0}),
    ]
    assert wandb.asked["mode"] == os.environ["WANDB_MODE"] == "offline"
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    assert wandb.asked["dir"] == str(tmp_path)
    assert wandb.asked["config"] == plan.model_dump(mode="json")
    assert wandb.asked["settings"]["console"] == "off"
    assert wandb.ended == [0]
    assert told == []


def test_a_run_that_fails_is_a_failed_run(tmp_path: Path, wandb: FakeWandB) -> None:
    with pytest.raises(RunError), Trackers(plan_with("wandb"), tmp_path, 0, print):
        raise RunError("x")
    assert wandb.ended == [1]


def test_a_tracker_that_cannot_write_is_told_of_once(tmp_path: Path, wandb: FakeWandB) -> None:
    told: list[str] = []
    with Trackers(plan_with("wandb"), tmp_path, 0, told.append) as trackers:
        trackers.on_step(step(1))
        wandb.failure = FULL
        trackers.on_step(step(2))
        trackers.on_step(step(3))
    assert told == ["run.trackers: wandb: No space left on device; it is told nothing more"]
    assert [number for number, _ in wandb.rows] == [1]


def test_a_tracker_that_cannot_begin_is_told_of(
    tmp_path: Path, wandb: FakeWandB, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("no service\nwith details")

    monkeypatch.setattr(wandb, "init", init)
    told: list[str] = []
    with Trackers(plan_with("wandb"), tmp_path, 0, told.append) as trackers:
        trackers.on_step(step(1))
    assert told == ["run.trackers: wandb: no service; it is told nothing more"]


def events(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by name, as TensorBoard shows them."""
    reader: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(directory / "tensorboard"))
    found.Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    hook, told = threading.excepthook, []
    for done, last in ((0, 4), (2, 5)):  # went on from the checkpoint of step 2
        with Trackers(plan_with("tensorboard"), tmp_path, done, told.append) as trackers:
            if done == 0:
                trackers.on_validation(validation(0))
            for number in range(done + 1, last + 1):
                trackers.on_step(step(number))
    shown = events(tmp_path)
    assert shown.keys() == {
        *(f"train/{name}" for name in ("loss", "grad_norm", "lr", "tokens_per_second", "mfu")),
        "validation/loss",
    }
    assert shown["train/loss"] == [(number, 5.0 - number) for number in range(1, 6)]
    assert shown["validation/loss"] == [(0, 6.0)]
    assert told == []
    assert threading.excepthook is hook


def test_tensorboard_on_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    record_writer = pytest.importorskip("tensorboard.summary.writer.record_writer")

    def flush(*_: object) -> None:
        raise FULL

    told: list[str] = []
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    with Trackers(plan_with("tensorboard"), tmp_path, 0, told.append) as trackers:
        trackers.on_step(step(1))
        monkeypatch.setattr(record_writer.RecordWriter, "flush", flush)
        monkeypatch.setattr(record_writer.RecordWriter, "write", flush)
        for number in range(2, 50):
            trackers.on_step(step(number))
    assert told == ["run.trackers: tensorboard: No space left on device; it is told nothing more"]
    assert capfd.readouterr() == ("", "")


def test_a_missing_package_is_refused_before_ranks_start(
    tmp_path: Path, missing: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing("tensorboard")
    (tmp_path / "r.toml").write_text('[model]\npreset = "tiny"\n[run]\ntrackers = ["tensorboard"]\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["shardwright", "train", "r.toml", "--run-dir", "run"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    way_out = "pip install 'shardwright[tensorboard]', or leave it out"
    assert f"run.trackers: tensorboard is not installed\n  {way_out}\n" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_missing_packages_are_one_error(missing: Callable[[str], None]) -> None:
    missing("tensorboard")
    missing("wandb")
    with pytest.raises(RunError) as refused:
        check_installed(["wandb", "tensorboard"])
    assert str(refused.value) == (
        "run.trackers: wandb and tensorboard are not installed\n"
        "  pip install 'shardwright[wandb,tensorboard]', or leave them out"
    )


def test_a_directory_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B makes a directory of its own name wherever it runs."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(RunError, match="wandb is not installed"):
        check_installed(["wandb"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["aim"], 'run.trackers[0]: "aim" is not one of its choices\n  one of: "tensorboard", "wandb"'),
        ("wandb", 'run.trackers: "wandb" is not a list\n  write it like run.trackers = []'),
        (["wandb"] * 2, 'run.trackers: "wandb" is named 2 times\n  name each tracker once'),
    ],
)
def test_wrong_trackers(value: object, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        build({"model": {"preset": "tiny"}, "run": {"trackers": value}})
    assert str(refused.value) == message
