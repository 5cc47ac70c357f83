"""Saving from GPUs: copies through pinned memory, votes and loads over NCCL, and the same bits afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RECIPE = """
[model]
layers = 4
hidden = 128
heads = 4

[data]
corpus = "random"
validation_fraction = 0.0

[train]
steps = 8
sequence_length = 64
global_batch_size = 8
micro_batch_size = 2
warmup_steps = 0

[checkpoint]
every = 3
"""

LAYOUTS = {
    "plain": ["parallel.zero=1"],
    "zero3": ["parallel.zero=3"],
    "state": ["parallel.zero=2", "memory.offload=state"],
    "update": ["parallel.zero=3", "memory.offload=update"],
    "pipeline": [f"parallel.pp={torch.cuda.device_count() or 1}", "parallel.dp=1", "memory.offload=state"],
}


def train(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "shardwright", "train", "r.toml", "model.vocab=509", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "steps.jsonl").open()]


def tensors(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "checkpoints" / "step-00000008").glob("*.safetensors")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_was_ended_early_goes_on_to_the_bit(tmp_path: Path, layout: str) -> None:
    (tmp_path / "r.toml").write_text(RECIPE)
    train(tmp_path, "--run-dir", "straight", *LAYOUTS[layout])
    train(tmp_path, "--run-dir", "two", "train.stop_after=4", *LAYOUTS[layout])
    train(tmp_path, "--run-dir", "two", "--resume", *LAYOUTS[layout])
    assert losses(tmp_path / "two") == losses(tmp_path / "straight")
    assert tensors(tmp_path / "two") == tensors(tmp_path / "straight")


def test_what_a_gpu_saved_a_cpu_goes_on_from(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(RECIPE)
    train(tmp_path, "--run-dir", "a", "train.stop_after=4", "train.dtype=fp32")
    train(
        tmp_path, "--run-dir", "a", "--resume", "train.dtype=fp32", "run.device=cpu", "parallel.tp=2", "parallel.dp=1"
    )
    assert len(losses(tmp_path / "a")) == 8
