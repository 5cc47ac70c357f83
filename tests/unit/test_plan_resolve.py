"""Spec -> Plan: what "auto" becomes, what is warned about, what is refused and with which words."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from shardwright.errors import LayoutError, RecipeError, ShardwrightError
from shardwright.layout.mesh import Topology
from shardwright.plan.describe import describe
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.spec.load import build

MODEL = {"layers": 6, "hidden": 96, "heads": 12}


def plan(
    *,
    world_size: int | None = None,
    device: str = "cpu",
    native_bf16: bool = True,
    tokenizer_vocab: int | None = 257,
    local_size: int | None = None,
    **sections: dict,
) -> Plan:
    spec = build({"model": MODEL | sections.pop("model", {})} | sections)
    return resolve(
        spec,
        world_size=world_size,
        device=device,  # pyright: ignore[reportArgumentType]
        native_bf16=native_bf16,
        tokenizer_vocab=tokenizer_vocab,
        local_size=local_size,
    )


def refusal(kind: type[ShardwrightError], **arguments) -> str:
    with pytest.raises(kind) as caught:
        plan(**arguments)
    return str(caught.value)


def test_defaults_on_two_ranks() -> None:
    made = plan(world_size=2)
    assert made.topology == Topology(replicate=1, pp=1, shard=2, tp=1)
    assert (made.world_size, made.num_microbatches, made.layers_per_stage) == (2, 4, (6,))
    assert (made.device, made.dtype, made.grad_dtype, made.sequence_length) == ("cpu", "bf16", "fp32", 256)
    assert made.architecture.vocab == 257
    assert made.warnings == ()
    assert made.decisions == (
        "parallel.dp = 2: it fills a world of 2",
        "parallel.dp_shard = 2: all of dp",
        "run.device = cpu: what this machine has",
        "train.dtype = bf16: this cpu computes bf16 natively",
        "model.vocab = 257: the tokenizer's",
    )


def test_plan_is_frozen_and_survives_json() -> None:
    scaling = {"factor": 8.0, "original_max_positions": 64}
    parallel = {"dp_shard": 2, "pp": 2, "stages": [4, 2], "order": "tp,pp,shard,replicate"}
    made = plan(world_size=8, local_size=2, model={"rope_scaling": scaling}, parallel=parallel)
    read = Plan.model_validate_json(made.model_dump_json())
    assert read == made
    assert read.topology.order == ("tp", "pp", "shard", "replicate")
    with pytest.raises(ValidationError):
        made.dtype = "fp32"  # pyright: ignore[reportAttributeAccessIssue]


def test_world_size_of_the_recipe() -> None:
    assert plan(parallel={"dp": 4}).world_size == 4
    alone = plan()
    assert alone.world_size == 1
    assert alone.decisions[0] == "parallel.dp = 1: no world size was given"


def test_dp_shard_splits_dp() -> None:
    made = plan(world_size=4, parallel={"dp": 4, "dp_shard": 2})
    assert (made.topology.replicate, made.topology.shard) == (2, 2)


@pytest.mark.parametrize(
    ("asked", "native", "dtype", "grad_dtype"),
    [
        ({}, False, "fp32", "fp32"),
        ({"dtype": "fp64"}, False, "fp64", "fp64"),
        ({"grad_dtype": "bf16"}, True, "bf16", "bf16"),
        ({"grad_dtype": "bf16"}, False, "fp32", "fp32"),
        ({"dtype": "fp64", "grad_dtype": "fp64"}, True, "fp64", "fp64"),
        ({"dtype": "fp32"}, True, "fp32", "fp32"),
    ],
)
def test_dtypes(asked: dict, native: bool, dtype: str, grad_dtype: str) -> None:
    made = plan(native_bf16=native, train=asked)
    assert (made.dtype, made.grad_dtype) == (dtype, grad_dtype)
    if grad_dtype != asked.get("grad_dtype", "fp32"):
        assert f"train.grad_dtype = {grad_dtype}: gradients are no narrower than {dtype} compute" in made.decisions


def test_emulated_bf16_is_warned_about() -> None:
    warning = "train.dtype = bf16: this cpu does not compute bf16 natively; fp32 may be faster"
    assert plan(native_bf16=False, train={"dtype": "bf16"}).warnings == (warning,)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"dtype": "fp32", "grad_dtype": "bf16"},
            'train.grad_dtype: bf16 is narrower than train.dtype = fp32\n  nearest that works: grad_dtype = "fp32"',
        ),
        (
            {"dtype": "fp32", "grad_dtype": "fp64"},
            "train.grad_dtype: fp64 goes with train.dtype = fp64, not with fp32\n"
            '  nearest that works: grad_dtype = "fp32"',
        ),
    ],
)
def test_train_refusals(train: dict, message: str) -> None:
    assert refusal(RecipeError, train=train) == message


def test_warmup_that_does_not_fit_is_warned_about() -> None:
    warning = "train.warmup_steps = 10 do not fit into train.steps = 5"
    assert plan(train={"steps": 5}).warnings == (warning,)
    beside = "train.warmup_steps = 9 do not fit into train.steps = 10 beside 2 steps of decay"
    assert plan(train={"steps": 10, "warmup_steps": 9, "lr_schedule": "wsd"}).warnings == (beside,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"world_size": 4, "parallel": {"dp": 3}},
            "parallel.dp: dp x pp x tp = 3 x 1 x 1 = 3 ranks, but the world has 4\n"
            "  what works: dp = 4, or a world of 3",
        ),
        (
            {"world_size": 3, "parallel": {"dp": 2, "pp": 2}},
            "parallel.dp: dp x pp x tp = 2 x 2 x 1 = 4 ranks, but the world has 3\n  what works: a world of 4",
        ),
        (
            {"world_size": 6, "parallel": {"pp": 2, "tp": 2}},
            "parallel.dp: a world of 6 does not divide by parallel.pp x parallel.tp = 2 x 2\n"
            "  nearest that works: a world of 4 or 8, or parallel.pp = 1 or 3",
        ),
        (
            {"world_size": 3, "parallel": {"pp": 2, "tp": 2}},
            "parallel.dp: a world of 3 does not divide by parallel.pp x parallel.tp = 2 x 2\n"
            "  nearest that works: a world of 4",
        ),
        (
            {"parallel": {"tp": 8}},
            "parallel.tp: 8 does not divide model.heads = 12\n  nearest that works: tp = 4 or 6",
        ),
        (
            {"parallel": {"dp": 4, "dp_shard": 3}},
            "parallel.dp_shard: 3 does not divide parallel.dp = 4\n  nearest that works: dp_shard = 2 or 4",
        ),
        (
            {"parallel": {"dp": 3}},
            "train.global_batch_size: 16 is not divisible by dp x train.micro_batch_size = 3 x 2\n"
            "  nearest that works: train.global_batch_size = 12 or 18, or parallel.dp = 2 or 4",
        ),
        (
            {"train": {"global_batch_size": 3}},
            "train.global_batch_size: 3 is not divisible by dp x train.micro_batch_size = 1 x 2\n"
            "  nearest that works: train.global_batch_size = 2 or 4",
        ),
        (
            {"train": {"global_batch_size": 2, "micro_batch_size": 4}},
            "train.global_batch_size: 2 is not divisible by dp x train.micro_batch_size = 1 x 4\n"
            "  nearest that works: train.global_batch_size = 4",
        ),
        (
            {"model": {"ffn": 3}, "parallel": {"tp": 6}},
            "parallel.tp: 6 is more than model.ffn = 3, of which each rank has a part\n  nearest that works: tp = 3",
        ),
        (
            {"model": {"vocab": 5}, "parallel": {"tp": 6}, "tokenizer_vocab": None},
            "parallel.tp: 6 is more than model.vocab = 5, of which each rank has a part\n  nearest that works: tp = 4",
        ),
    ],
)
def test_layout_refusals(arguments: dict, message: str) -> None:
    assert refusal(LayoutError, **arguments) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"parallel": {"order": "pp,tp"}},
            'parallel.order: "pp,tp" does not name each axis of the mesh once\n'
            '  the default is "replicate,pp,shard,tp"',
        ),
        (
            {"run": {"device": "cuda"}},
            'run.device: cuda was asked for, and the ranks run on cpu\n  what works: run.device = "auto" or "cpu"',
        ),
        (
            {"run": {"backend": "nccl"}},
            "run.backend: nccl moves the memory of GPUs, and the ranks run on cpu\n"
            '  what works: run.backend = "auto" or "gloo", or run.device = "cuda"',
        ),
        (
            {"model": {"vocab": 100}},
            "model.vocab: 100 is smaller than the tokenizer's 257\n  give model.vocab = 257 or more, or leave it out",
        ),
        (
            {"model": {"positions": "learned", "max_positions": 64}},
            "model.max_positions: 64 learned positions are fewer than train.sequence_length = 256\n"
            "  what works: train.sequence_length = 64, or model.max_positions = 256",
        ),
    ],
)
def test_recipe_refusals(arguments: dict, message: str) -> None:
    assert refusal(RecipeError, **arguments) == message


def test_weights_that_are_not_there() -> None:
    assert refusal(RecipeError, model={"init_from": "x"}) == (
        "model.init_from: x: no such directory\n  give a checkpoint, a run directory or a Hugging Face directory"
    )


def test_ranks_that_share_gpus_are_told() -> None:
    told = "run.backend = gloo: ranks share GPUs where they are more than these, and exchange through host memory"
    assert told in plan(world_size=4, device="cuda", run={"backend": "gloo"}).decisions
    for device, run in (("cuda", {}), ("cuda", {"backend": "nccl"}), ("cpu", {"backend": "gloo"})):
        assert not any("run.backend" in decision for decision in plan(device=device, run=run).decisions)


def test_groups_that_cross_nodes_are_warned_about() -> None:
    shard = "parallel.dp_shard = 4: groups cross nodes of 2 ranks, where communication is slower"
    tp = "parallel.tp = 4: groups cross nodes of 2 ranks, where communication is slower"
    assert plan(world_size=4, local_size=2).warnings == (shard,)
    assert plan(world_size=4, local_size=2, parallel={"dp_shard": 2}).warnings == ()
    assert plan(world_size=4, local_size=2, parallel={"tp": 4}).warnings == (tp,)


def test_expected_vocab_stands_in_for_the_tokenizers() -> None:
    assert plan(tokenizer_vocab=None).architecture.vocab == 257
    assert plan(tokenizer_vocab=None, data={"tokenizer": "bpe:8192"}).architecture.vocab == 8192
    assert plan(tokenizer_vocab=None, model={"vocab": 100}).architecture.vocab == 100
    assert "the tokenizer's is not known yet" in refusal(
        RecipeError, tokenizer_vocab=None, data={"tokenizer": "some/tokenizer.json"}
    )


def test_describe() -> None:
    made = plan(world_size=8, local_size=4, parallel={"pp": 2, "dp_shard": 2})
    lines = describe(made)
    assert dict(lines) | {"decided": ""} == {
        "model": "714 k parameters: 6 layers, hidden 96, 12 heads (12 kv), ffn 256, vocab 257",
        "layout": "8 ranks: dp 4 (replicate 2 x shard 2) x pp 2 x tp 1 on cpu",
        "pipeline": "1f1b over 2 stages of 3 + 3 layers, 2 microbatches: bubble 34 % estimated",
        "batch": "16 sequences of 256 tokens = 4.1 k tokens; 2 microbatches of 2 on each data rank",
        "precision": "bf16, gradients fp32",
        "zero": "1: optimizer state sharded over 2 ranks",
        "train": "150 steps of adamw, lr 0.001 cosine",
        "saves": "every 100 steps, 8.17 MiB each, the newest 2 kept; ranks keep as much host memory, shared among them",
        "decided": "",
    }
    assert [value for label, value in lines if label == "decided"] == list(made.decisions)
    assert ("layout", "1 rank: dp 1 (replicate 1 x shard 1) x pp 1 x tp 1 on cpu") in describe(plan())
    assert describe(plan(native_bf16=False, train={"dtype": "bf16"}))[-1][0] == "warning"
