"""How many ranks a machine starts for a recipe."""

from __future__ import annotations

import pytest

from shardwright.errors import LayoutError
from shardwright.plan.world import local_world_size
from shardwright.spec.load import build


def ranks(cores: int, gpus: int = 0, **sections: dict) -> int:
    return local_world_size(build({"model": {}} | sections), cores=cores, gpus=gpus)


def test_a_number_is_taken_as_it_is() -> None:
    assert ranks(1, parallel={"dp": 3, "pp": 2, "tp": 2}) == 12


def test_auto_fills_the_machine_with_what_divides_the_batch() -> None:
    assert [ranks(cores) for cores in (1, 2, 3, 4, 7, 8, 64)] == [1, 2, 2, 4, 4, 8, 8]
    assert ranks(6, train={"global_batch_size": 6, "micro_batch_size": 1}) == 6
    assert ranks(8, parallel={"pp": 2}) == 8
    assert ranks(8, parallel={"pp": 3}) == 6


def test_at_least_one_replica() -> None:
    assert ranks(1, parallel={"pp": 2, "tp": 2}) == 4
    assert ranks(4, train={"global_batch_size": 3, "micro_batch_size": 2}) == 1


def test_gpus_before_cores() -> None:
    assert ranks(64, gpus=2) == 2
    assert ranks(2, gpus=8, run={"device": "cpu"}) == 2


def test_more_ranks_than_gpus() -> None:
    message = "run.device: 4 ranks need 4 GPUs, and this machine has 1\n" + (
        '  give run.device = "cpu", run.backend = "gloo", so that ranks share GPUs, or a layout of fewer ranks'
    )
    with pytest.raises(LayoutError) as caught:
        ranks(8, gpus=1, parallel={"dp": 4})
    assert str(caught.value) == message
    with pytest.raises(LayoutError) as caught:
        ranks(8, run={"device": "cuda"})
    assert str(caught.value) == "run.device: 1 ranks need 1 GPUs, and this machine has 0\n" + (
        '  give run.device = "cpu", or a layout of fewer ranks'
    )


def test_over_gloo_ranks_share_gpus() -> None:
    run = {"device": "cuda", "backend": "gloo"}
    assert ranks(2, gpus=1, run=run, parallel={"dp": 2, "tp": 2}) == 4
    assert ranks(16, gpus=2, run=run) == 2  # "auto" fills the GPUs, not the cores
    with pytest.raises(LayoutError, match="4 ranks need 4 GPUs, and this machine has 0"):
        ranks(8, run=run, parallel={"dp": 4})
