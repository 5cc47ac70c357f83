"""Generation on GPUs over NCCL says the same on every layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shardwright.checkpoint.exchange.export import export
from shardwright.data.tokenizer import BytesTokenizer
from shardwright.nn.initial import Seeded
from shardwright.spec.architecture import resolve_architecture
from shardwright.spec.model import ModelSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

FIELDS = {"layers": 4, "hidden": 64, "heads": 4, "kv_heads": 2, "vocab": 300, "max_positions": 128, "init_std": 0.3}
LAYOUTS = [["parallel.tp=2"], ["parallel.pp=2"], ["parallel.dp=2"], ["parallel.dp=2", "parallel.zero=3"]]
PROMPTS = ["a", "def function(argument):", "something longer than the others are"]


def said(model: Path, *arguments: str) -> list[list[int]]:
    given = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    command = [sys.executable, "-m", "shardwright", "generate", str(model), "train.dtype=fp32", "--json", *given]
    done = subprocess.run(
        [*command, "--max-new-tokens", "48", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [row["tokens"] for row in json.loads(done.stdout)["completions"]]


def test_every_layout_says_the_same(tmp_path: Path) -> None:
    spec = ModelSpec.model_validate(FIELDS)
    architecture = resolve_architecture(spec, sequence_length=128, tokenizer_vocab=None)
    companions = tmp_path / "companions"
    companions.mkdir()
    BytesTokenizer().save(companions)
    export(Seeded(0), architecture, tmp_path / "model", companions=companions)
    for settings in ([], ["--temperature", "0.9", "--seed", "3"]):
        alone = said(tmp_path / "model", *settings)
        assert len({token for tokens in alone for token in tokens}) > 20
        for layout in LAYOUTS:
            assert said(tmp_path / "model", *settings, *layout) == alone, layout
