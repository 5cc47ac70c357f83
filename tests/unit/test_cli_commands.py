"""What the commands pass on, and how they end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from shardwright.cli import main as command
from shardwright.errors import RunError


@pytest.fixture
def shardwright(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command as the console script does and returns its exit code."""

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["shardwright", *arguments])
        with pytest.raises(SystemExit) as ended:
            command.main()
        return int(ended.value.code or 0)

    return call


@pytest.fixture
def replace_body(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable], None]:
    """Puts a function in the place of a command's, e.g. of train.run's `train`."""

    def put(name: str, function: Callable) -> None:
        folder = f"shardwright.{name}"
        module = ModuleType(f"{folder}.run")
        setattr(module, name, function)
        package = ModuleType(folder)
        package.__dict__["run"] = module
        monkeypatch.setitem(sys.modules, folder, package)
        monkeypatch.setitem(sys.modules, f"{folder}.run", module)

    return put


@pytest.mark.parametrize(
    "arguments",
    [
        ["r.toml", "--run-dir", "d", "parallel.dp=2", "train.steps=5"],
        ["r.toml", "parallel.dp=2", "train.steps=5", "--run-dir", "d"],
        ["--run-dir", "d", "r.toml", "parallel.dp=2", "train.steps=5"],
    ],
)
def test_train(shardwright, replace_body, arguments: list[str]) -> None:
    seen = []
    replace_body("train", lambda *given, resume: seen.append((*given, resume)) or 3)
    assert shardwright("train", *arguments) == 3
    assert shardwright("train", *arguments, "--resume") == 3
    overrides = ["parallel.dp=2", "train.steps=5"]
    assert seen == [("r.toml", overrides, "d", False), ("r.toml", overrides, "d", True)]


def test_train_defaults(shardwright, replace_body) -> None:
    seen = []
    replace_body("train", lambda *given, **_: seen.append(given) or 0)
    assert shardwright("train", "r.toml") == 0
    assert seen == [("r.toml", [], None)]


def test_verify(shardwright, replace_body) -> None:
    seen = []
    replace_body("verify", lambda *given: seen.append(given) or 1)
    assert shardwright("verify", "r.toml", "parallel.dp=2", "--steps", "4", "--json") == 1
    assert shardwright("verify", "r.toml") == 1
    assert seen == [("r.toml", ["parallel.dp=2"], 4, True), ("r.toml", [], 3, False)]


def test_an_error_is_printed_once_without_a_traceback(shardwright, replace_body, capsys) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise RunError("runs/a: already holds a run", "give --resume to go on with it")

    replace_body("train", refuse)
    assert shardwright("train", "r.toml") == 2
    captured = capsys.readouterr()
    assert captured.err == "error: runs/a: already holds a run\n  give --resume to go on with it\n"
    assert captured.out == ""


def test_interruption_is_130(shardwright, replace_body) -> None:
    def interrupt(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    replace_body("train", interrupt)
    assert shardwright("train", "r.toml") == 130


def test_a_defect_keeps_its_traceback(replace_body, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_body("train", lambda *_, **__: 1 // 0)
    monkeypatch.setattr(sys, "argv", ["shardwright", "train", "r.toml"])
    with pytest.raises(ZeroDivisionError):
        command.main()


def test_data_prepare(shardwright, tmp_path: Path, capsys) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}\n" * 9)
    out = tmp_path / "out"
    paths = ["--corpus", str(tmp_path / "a.txt"), "--corpus", str(tmp_path / "b.txt")]
    options = ["--tokenizer", "bytes", "--out", str(out), "--validation-fraction", "0.5", "--seed", "1"]
    assert shardwright("data", "prepare", *paths, *options) == 0
    assert f"{out}: bytes, vocabulary 257\n" in capsys.readouterr().out
    assert shardwright("data", "prepare", *paths, *options, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["vocab_size"] == 257
    assert content["directory"] == str(out)
    assert content["splits"]["train"]["documents"] + content["splits"]["validation"]["documents"] == 2


def test_data_prepare_without_a_corpus(shardwright, tmp_path: Path, capsys) -> None:
    missing = tmp_path / "none"
    assert shardwright("data", "prepare", "--corpus", str(missing), "--out", str(tmp_path / "out")) == 2
    assert capsys.readouterr().err.startswith(f"error: data.corpus: {missing}")


def test_unknown_command(shardwright, capsys) -> None:
    assert shardwright("trian") == 2
    assert "trian" in capsys.readouterr().err


def test_no_arguments_prints_help(shardwright, capsys) -> None:
    shardwright()
    assert "Usage: shardwright" in "".join(capsys.readouterr())


def test_python_m_shardwright() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shardwright", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("shardwright ")
