"""What is saved on one layout is, to the bit, what another layout goes on from."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import GPT2, LLAMA, QWEN, QWEN2, plan_of
from pool import Place, Pool
from torch import Tensor

from shardwright.checkpoint.folder import CheckpointFolder
from shardwright.checkpoint.load import Checkpoint
from shardwright.checkpoint.manifest import WEIGHTS, Training
from shardwright.checkpoint.resume import newest_good
from shardwright.checkpoint.save import Saver
from shardwright.checkpoint.state import num_updates
from shardwright.data.samples import RandomSamples
from shardwright.layout.box import Box
from shardwright.optim.optimizers import SGD, AdamW, make_optimizer
from shardwright.parallel.compose import Runtime, compose
from shardwright.plan.plan import Plan
from shardwright.train.batches import batch_at
from shardwright.train.step import train_step

pytestmark = pytest.mark.world

FAMILIES = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN, "gpt2": GPT2}
LR = 1e-2

Owned = list[tuple[str, Box, Tensor]]
"""Kind, box and values of what a rank owns, whoever else has it too."""


@dataclass
class Driven:
    """What a rank saw: the losses of its steps, and what it owned before and after them."""

    before: Owned
    losses: list[float]
    after: Owned


def owned(runtime: Runtime, optimizer: AdamW | SGD) -> Owned:
    found = []
    for unit in runtime.states.units:
        state = optimizer.state(unit.name)
        flats = {WEIGHTS: unit.updated_values()} | {kind: state[kind] for kind in optimizer.names}
        for kind, flat in flats.items():
            for piece in unit.owned_pieces:
                found.append((kind, piece.box, flat[piece.start : piece.stop].view(piece.box.size).clone()))
    return found


def drive(place: Place, plan: Plan, folder: Path, steps: int, save_after: int | None = None) -> Driven:
    """In a rank: go on from the folder's newest checkpoint, if there is one, for some steps, and save after one."""
    mesh = place.mesh(plan.topology)
    checkpoint = newest_good(CheckpointFolder(folder), mesh, lambda _: None)
    runtime = compose(plan, mesh, values=checkpoint.weights if checkpoint else None)
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    step = position = 0
    if checkpoint is not None:
        training = checkpoint.manifest.training
        assert training is not None
        checkpoint.restore(runtime, optimizer)
        step, position = training.step, training.position
    saver = Saver(CheckpointFolder(folder), runtime, optimizer, folder / "no companions")
    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, seed=5)
    before, losses = owned(runtime, optimizer), []
    for _ in range(steps):
        batch = batch_at(runtime, samples, position)
        result = train_step(runtime, optimizer, batch, LR, votes=saver.votes())
        saver.heard(*result.votes)
        losses.append(result.loss)
        step, position = step + 1, position + plan.spec.train.global_batch_size
        if len(losses) == save_after:
            saver.save(standing(plan, step, position, num_updates(runtime, optimizer)))
    saver.drain()
    runtime.states.finish()
    return Driven(before, losses, owned(runtime, optimizer))


def standing(plan: Plan, step: int, position: int, updates: int) -> Training:
    return Training(
        step=step,
        position=position,
        updates=updates,
        optimizer=plan.spec.train.optimizer,
        seed=0,
        data="random",
        world_size=plan.world_size,
    )


def whole(parts: list[Owned]) -> dict[tuple[str, str], Tensor]:
    """Whole tensors from what the ranks own; what several have must be the same on all."""
    tensors: dict[tuple[str, str], Tensor] = {}
    for kind, box, values in (entry for own in parts for entry in own):
        tensor = tensors.setdefault((kind, box.name), torch.full(box.tensor.shape, math.nan, dtype=values.dtype))
        there = tensor[box.slices()]
        assert (there.isnan() | (there == values)).all(), f"{kind}/{box}: copies differ"
        there.copy_(values)
    assert not any(tensor.isnan().any() for tensor in tensors.values())
    return tensors


def assert_same(found: dict[Any, Tensor], expected: dict[Any, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def layout(**parallel: Any) -> dict[str, Any]:
    return {"dp": 1, "tp": 1, "pp": 1, "zero": 1, "pipeline_schedule": "1f1b"} | parallel


# The same layout goes on to the bit

SAME = {
    **{f"zero{zero}": (layout(dp=4, zero=zero), "none") for zero in range(4)},
    "3d": (layout(dp=2, pp=2, zero=1), "none"),
    "tp": (layout(tp=2, pp=2, zero=0), "none"),
    "hybrid": (layout(dp=4, dp_shard=2, zero=3), "none"),
    "state": (layout(dp=2, pp=2, zero=2), "state"),
    "update": (layout(dp=2, tp=2, zero=3), "update"),
    "gpipe": (layout(dp=2, pp=2, zero=3, pipeline_schedule="gpipe"), "none"),
    "interleaved": (layout(dp=2, pp=2, zero=2, pipeline_schedule="interleaved", virtual_stages=2), "none"),
    "zb-h1": (layout(dp=2, pp=2, zero=1, pipeline_schedule="zb-h1"), "update"),
    "zbv": (layout(dp=2, pp=2, zero=3, pipeline_schedule="zbv", virtual_stages=2), "state"),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("zero3", "sgd"), ("state", "sgd")]
    + [(case, "fp32") for case in SAME]
    + [(case, "bf16") for case in ("zero3", "3d", "state", "update")],
)
def test_ten_steps_and_ten_more_are_twenty(pool: Pool, tmp_path: Path, case: str, dtype: str) -> None:
    parallel, offload = SAME[case]
    model = LLAMA | {"layers": 4, "kv_heads": 6, "tied_embeddings": True}
    batch = {"sequence_length": 5, "global_batch_size": 4, "micro_batch_size": 1}
    rule = {"optimizer": "sgd", "dtype": "fp32"} if dtype == "sgd" else {"dtype": dtype}
    plan = plan_of(model, parallel, {"offload": offload}, **rule, **batch)
    straight = pool.run(plan.world_size, drive, plan, tmp_path / "straight", 20)
    first = pool.run(plan.world_size, drive, plan, tmp_path / "two", 10, 10)
    second = pool.run(plan.world_size, drive, plan, tmp_path / "two", 10)
    for rank in range(plan.world_size):
        assert first[rank].losses + second[rank].losses == straight[rank].losses
    assert_same(whole([own.after for own in second]), whole([own.after for own in straight]))


# Any layout goes on from any other

LAYOUTS = [
    (dp, tp, pp) for dp in (1, 2, 4) for tp in (1, 2, 4) for pp in (1, 2, 4) if dp * tp * pp <= 4 and dp * tp * pp > 0
]


def drawn_layout(draw: random.Random) -> dict[str, Any]:
    dp, tp, pp = draw.choice(LAYOUTS)
    schedule = draw.choice(["gpipe", "1f1b", "interleaved", "zb-h1", "zbv"]) if pp > 1 else "1f1b"
    schedule = schedule if pp < 4 or schedule not in ("interleaved", "zbv") else "zb-h1"  # of four layers
    virtual = 2 if schedule in ("interleaved", "zbv") else 1
    return layout(
        dp=dp,
        tp=tp,
        pp=pp,
        zero=draw.randrange(4),
        dp_shard=draw.choice([degree for degree in (1, 2, 4) if dp % degree == 0]),
        pipeline_schedule=schedule,
        virtual_stages=virtual,
        sequence_parallel=draw.random() < 0.7,
    )


def drawn_pair(
    number: int,
) -> tuple[str, dict[str, Any], tuple[dict[str, Any], str, str], tuple[dict[str, Any], str, str]]:
    """A model, and two (layout, offload, dtype) for it."""
    draw = random.Random(number)
    family = draw.choice(sorted(FAMILIES))
    model = FAMILIES[family] | {
        "layers": 4,
        "kv_heads": draw.choice([3, 4, 12]),
        "tied_embeddings": draw.random() < 0.5,
    }
    dtype = draw.choice(["fp64", "fp64", "fp32", "bf16"])
    other = "bf16" if dtype == "fp32" and draw.random() < 0.5 else "fp32" if dtype == "bf16" else dtype
    ends = [(drawn_layout(draw), draw.choice(["none", "state", "update"]), d) for d in (dtype, other)]
    return family, model, ends[0], ends[1]


@pytest.mark.parametrize("number", range(60))
def test_a_layout_goes_on_from_another(pool: Pool, tmp_path: Path, number: int) -> None:
    _, model, *ends = drawn_pair(number)
    here, there = (
        plan_of(model, parallel, {"offload": offload}, dtype=dtype, global_batch_size=8, micro_batch_size=1)
        for parallel, offload, dtype in ends
    )
    pool.run(here.world_size, drive, here, tmp_path, 2, 2)
    saved = Checkpoint.open(tmp_path / "step-00000002")
    saved.check()
    straight = pool.run(here.world_size, drive, here, tmp_path, 3)
    resharded = pool.run(there.world_size, drive, there, tmp_path, 3)
    assert_same(whole([own.before for own in resharded]), whole([own.before for own in straight]))
    assert_same(whole([own.before for own in resharded]), of_file(saved))
    if here.dtype == there.dtype != "bf16":
        bar = 1e-10 if here.dtype == "fp64" else 5e-6
        assert resharded[0].losses == pytest.approx(straight[0].losses, rel=bar)


def of_file(checkpoint: Checkpoint) -> dict[Any, Tensor]:
    """Every whole tensor of a checkpoint."""
    found = {}
    for (kind, name), stored in checkpoint.stored.items():
        box = Box.whole(stored[0].box.tensor)
        found[kind, name] = torch.empty(
            box.size, dtype=torch.float64 if checkpoint.manifest.kinds[kind] == "F64" else None
        )
        checkpoint.kind(kind).read(box, found[kind, name])
    return found
