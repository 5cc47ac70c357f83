"""What offload keeps on a host, and what is said where that, or a chunk, does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from shardwright.errors import LayoutError
from shardwright.plan.host import check_host, host_memory
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.spec.load import build
from shardwright.units import Bytes

MODEL = {"layers": 6, "hidden": 64, "heads": 4, "ffn": 128, "vocab": 512}


def plan(world_size: int = 4, local_size: int | None = None, **sections: dict[str, Any]) -> Plan:
    train = {"global_batch_size": 8, "micro_batch_size": 1, "dtype": "bf16"}
    recipe = {"model": MODEL, "train": train} | sections
    return resolve(
        build(recipe),
        world_size=world_size,
        device="cpu",
        native_bf16=True,
        tokenizer_vocab=None,
        local_size=local_size,
    )


@pytest.mark.parametrize(
    ("offload", "zero", "train", "per_parameter"),
    [
        ("none", 1, {}, 0),
        ("state", 0, {}, 12),
        ("state", 1, {}, 12 / 4),
        ("update", 3, {}, 16 / 4),  # gradients are fp32 unless asked for otherwise
        ("update", 2, {"grad_dtype": "bf16"}, 14 / 4),
        ("state", 2, {"dtype": "fp32"}, 8 / 4),
        ("update", 2, {"dtype": "fp32"}, 16 / 4),
        ("state", 1, {"dtype": "fp64", "optimizer": "sgd"}, 8 / 4),
        ("update", 1, {"dtype": "fp64", "optimizer": "sgd"}, 24 / 4),
    ],
)
def test_host_memory(offload: str, zero: int, train: dict[str, Any], per_parameter: float) -> None:
    made = plan(
        memory={"offload": offload},
        parallel={"zero": zero},
        train={"global_batch_size": 8, "micro_batch_size": 1, "dtype": "bf16"} | train,
    )
    assert [host_memory(made, rank) for rank in range(4)] == [per_parameter * made.architecture.num_parameters] * 4


def test_each_rank_of_a_pipeline_keeps_its_own_stages() -> None:
    made = plan(memory={"offload": "state"}, parallel={"pp": 4, "stages": [1, 2, 2, 1]})
    assert sum(host_memory(made, rank) for rank in range(4)) == 12 * made.architecture.num_parameters
    assert host_memory(made, 0) != host_memory(made, 1)


def refusal(world_size: int = 4, local_size: int | None = None, **sections: dict[str, Any]) -> str:
    with pytest.raises(LayoutError) as caught:
        plan(world_size, local_size, **sections)
    return str(caught.value)


def test_a_limit_that_is_too_low_is_refused_with_what_fits() -> None:
    memory = {"offload": "state", "host_limit": "5 MiB"}
    assert refusal(memory=memory, parallel={"zero": 0}) == (
        'memory.host_limit: "5 MiB", but memory.offload = "state" keeps 14.3 MiB on a host of 4 ranks\n'
        '  what fits: parallel.zero = 1, or parallel.zero = 1 with memory.offload = "update"'
    )
    memory = {"offload": "update", "host_limit": "4 MiB"}
    assert refusal(memory=memory) == (
        'memory.host_limit: "4 MiB", but memory.offload = "update" keeps 4.76 MiB on a host of 4 ranks\n'
        '  what fits: memory.offload = "state"'
    )


def test_a_limit_that_nothing_fits() -> None:
    assert refusal(memory={"offload": "state", "host_limit": "1 MiB"}) == (
        'memory.host_limit: "1 MiB", but memory.offload = "state" keeps 3.57 MiB on a host of 4 ranks\n'
        "  own less on each host: fewer ranks on it, or a larger parallel.dp_shard with parallel.zero >= 1"
    )


def test_the_limit_is_a_hosts_and_counts_its_ranks() -> None:
    memory = {"offload": "state", "host_limit": "2 MiB"}
    assert refusal(memory=memory).startswith('memory.host_limit: "2 MiB"')
    assert plan(local_size=2, memory=memory).world_size == 4
    assert plan(memory={"host_limit": "1 B"}).world_size == 4  # nothing is offloaded


def test_without_a_limit_it_is_what_the_host_has() -> None:
    made = plan(memory={"offload": "update"})
    check_host(made, 4, None)
    check_host(made, 4, Bytes(1 << 30))
    with pytest.raises(LayoutError) as caught:
        check_host(made, 4, Bytes(4 << 20))
    assert str(caught.value) == (
        'memory.host_limit: 4 MiB is what the host has, but memory.offload = "update" keeps 4.76 MiB on a host of 4 '
        'ranks\n  what fits: memory.offload = "state"'
    )


def test_a_chunk_of_too_few_elements_is_refused() -> None:
    assert refusal(memory={"offload": "state", "offload_chunk": "600 B"}) == (
        'memory.offload_chunk: "600 B" holds 50 elements of 12 bytes, and 64 belong together\n'
        '  nearest that works: memory.offload_chunk = "768 B"'
    )
    assert plan(memory={"offload": "state", "offload_chunk": "768 B"}).world_size == 4
    assert plan(memory={"offload": "update", "offload_chunk": "1 B"}).world_size == 4  # nothing streams
