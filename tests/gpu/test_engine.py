"""What a CPU cannot show: kernels, streams and host copies of a GPU, with one rank and with several that share it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardwright.comm.job import Job
from shardwright.comm.launch import launch
from shardwright.comm.mesh import Mesh
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import compose
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.record.store import read_json
from shardwright.spec.load import build
from shardwright.train.batches import rank_batch
from shardwright.train.step import train_step
from shardwright.verify.run import verify
from shardwright.verify.trace import samples_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MODEL = {"layers": 4, "hidden": 64, "heads": 8, "kv_heads": 4, "ffn": 96, "vocab": 509}
RECIPE = """
[model]
layers = 4
hidden = 64
heads = 8
kv_heads = 4
ffn = 96
vocab = 509
[train]
sequence_length = 33
global_batch_size = 16
micro_batch_size = 1
dtype = "bf16"
[run]
device = "cuda"
backend = "gloo"
"""

LAYOUTS = [
    "parallel.dp=1",
    "parallel.dp=2 parallel.zero=2",
    "parallel.dp=2 parallel.tp=2 parallel.zero=3",
    "parallel.dp=1 parallel.tp=2 parallel.pp=2 parallel.pipeline_schedule=zb-h1",
    "parallel.dp=2 parallel.tp=2 parallel.pp=2 parallel.zero=3",
    "parallel.dp=2 parallel.tp=2 parallel.zero=3 memory.recompute=selective run.compile=true",
]


@pytest.mark.parametrize("overrides", LAYOUTS)
def test_ranks_that_share_a_gpu_compute_what_one_device_computes(tmp_path: Path, overrides: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    assert verify(str(recipe), overrides.split(), steps=2, json_output=True) == 0


def test_verbs_on_tensors_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    job = Job(4, "gpu_worker", (str(tmp_path),), device="cuda", backend="gloo")
    assert launch(job) == 0
    for rank in range(4):
        found = read_json(tmp_path / f"{rank}.json")
        assert all(found.values()), found


def plan_of(**run: bool) -> Plan:
    train = {"sequence_length": 32, "global_batch_size": 4, "micro_batch_size": 2, "dtype": "fp32"}
    spec = build({"model": MODEL, "train": train, "run": run})
    return resolve(spec, world_size=1, device="cuda", native_bf16=True, tokenizer_vocab=None)


def losses(plan: Plan) -> list[float]:
    runtime = compose(plan, Mesh(plan.topology, torch.device("cuda", 0), rank=0))
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    batches = [rank_batch(runtime, samples_for(plan), step) for step in range(3)]
    return [train_step(runtime, optimizer, batch, 1e-3).loss for batch in batches]


def test_compiled_kernels_compute_what_eager_ones_do() -> None:
    assert losses(plan_of(compile=True)) == pytest.approx(losses(plan_of()), rel=1e-5)
