"""Whether plans fit a device, the changes that are proposed, and FLOPs."""

from __future__ import annotations

import pytest

from shardwright.errors import LayoutError
from shardwright.plan.fit import MOST_CHANGES, fit, fullest, fullest_by_stage, with_fields
from shardwright.plan.flops import flops_of, recomputed_per_token
from shardwright.plan.memory import estimated_memory
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.plan.world import crossings
from shardwright.spec.load import build
from shardwright.spec.spec import Spec
from shardwright.units import Bytes

MIB = 2**20


def spec(**sections: dict) -> Spec:
    train = {"sequence_length": 512, "global_batch_size": 64, "micro_batch_size": 4} | sections.pop("train", {})
    return build({"model": {"preset": "small-25m"}, "train": train, "run": {"device": "cuda"}} | sections)


def planned(asked: Spec, world: int | None = None) -> Plan:
    return resolve(asked, world_size=world, device="cuda", native_bf16=True, tokenizer_vocab=None)


def fitted(plan: Plan, usable: float, ranks_per_node: int = 8):
    return fit(plan, Bytes(round(usable)), ranks_per_node, lambda changed: planned(changed, plan.world_size))


@pytest.mark.parametrize(
    "parallel", [{"dp": 2}, {"dp": 2, "pp": 2, "tp": 2}, {"pp": 4, "tp": 8, "zero": 0}, {"dp": 2, "pp": 2, "zero": 3}]
)
def test_the_fullest_rank_of_each_place_is_the_fullest_of_all_there(parallel: dict) -> None:
    plan = planned(spec(parallel=parallel))
    every = [estimated_memory(plan, rank) for rank in range(plan.world_size)]
    records = fullest_by_stage(plan)
    assert len(records) == plan.topology.pp
    for pp, record in enumerate(records):
        here = [one for one in every if plan.topology.coordinate(one.rank).pp == pp]
        assert record.peak == max(one.peak for one in here)
        assert record in here
    assert fullest(records).peak == max(one.peak for one in every)


def test_what_fits_says_what_is_left() -> None:
    found = fitted(planned(spec()), 16 * 2**30)
    assert found.fits and found.changes == ()
    assert str(found).startswith("fits: ") and str(found).endswith(" left)")


def test_what_does_not_fit_says_how_much_is_missing_and_what_would() -> None:
    plan = planned(spec(parallel={"dp": 4}))
    needed = fullest(fullest_by_stage(plan)).peak
    found = fitted(plan, needed - 1)
    assert not found.fits
    assert str(found).startswith("does not fit: needs ")
    assert 1 <= len(found.changes) <= MOST_CHANGES
    assert found.changes[0].fields == {"memory.recompute": "selective"}
    assert {"train.micro_batch_size": 2} in [change.fields for change in found.changes]  # not also 1


def test_every_change_was_evaluated_by_itself() -> None:
    plan = planned(spec(parallel={"dp": 4, "zero": 0}))
    needed = fullest(fullest_by_stage(plan)).peak
    for share in (0.95, 0.8, 0.6, 0.5, 0.4):
        for change in fitted(plan, share * needed).changes:
            again = planned(with_fields(plan.spec, change.fields), plan.world_size)
            assert again.world_size == 4
            assert fullest(fullest_by_stage(again)).peak == change.peak <= share * needed


def test_where_one_change_is_not_enough_two_are_tried_and_where_none_is_nothing_is_said() -> None:
    plan = planned(spec(parallel={"dp": 4, "zero": 0}))
    needed = fullest(fullest_by_stage(plan)).peak
    numbers = [
        {len(change.fields.keys() - {"parallel.dp"}) for change in fitted(plan, share / 100 * needed).changes}
        for share in range(95, 0, -5)
    ]
    assert {1} in numbers and {2} in numbers and set() in numbers
    assert numbers == sorted(numbers, key=lambda number: max(number, default=3))


def test_more_ranks_keep_to_the_world_and_tensors_to_the_node() -> None:
    plan = planned(
        spec(parallel={"dp": 4, "tp": 2, "zero": 0}, memory={"recompute": "full"}, train={"micro_batch_size": 1})
    )
    needed = fullest(fullest_by_stage(plan)).peak
    proposed = [change.fields for change in fitted(plan, 0.75 * needed).changes]
    assert {"parallel.tp": 4, "parallel.dp": 2} in proposed
    proposed = [change.fields for change in fitted(plan, 0.75 * needed, ranks_per_node=2).changes]
    assert proposed and not any("parallel.tp" in fields for fields in proposed)


def test_a_change_that_cannot_be_is_passed_over() -> None:
    plan = planned(spec(parallel={"dp": 2}))

    def refuse(changed: Spec) -> Plan:
        raise LayoutError("refused")

    assert fit(plan, Bytes(MIB), 8, refuse).changes == ()


def test_flops_with_recomputation_repeat_the_forward_of_layers_but_for_the_last_product() -> None:
    plain = flops_of(planned(spec(parallel={"dp": 2})))
    a = planned(spec()).architecture
    assert plain.model_per_token == plain.hardware_per_token == a.flops_per_token(512)
    assert plain.model_per_step == 64 * 512 * plain.model_per_token
    assert plain.hardware_per_device == plain.model_per_step / 2
    full = flops_of(planned(spec(memory={"recompute": "full"})))
    forward = 2 * a.layer_matrix_parameters + 4 * a.heads * a.head_dim * 512
    assert recomputed_per_token(a, 512) == forward - 2 * a.hidden * a.ffn
    assert full.hardware_per_token - full.model_per_token == a.layers * recomputed_per_token(a, 512)
    some = flops_of(planned(spec(memory={"recompute": "full", "recompute_layers": [0, 3]})))
    assert some.hardware_per_token - some.model_per_token == 2 * recomputed_per_token(a, 512)
    assert flops_of(planned(spec(memory={"recompute": "selective"}))) == flops_of(planned(spec()))


def test_groups_that_cross_nodes() -> None:
    plan = planned(spec(parallel={"dp": 4, "tp": 4}))
    assert crossings(plan.topology, 16, 1) == ()
    assert crossings(plan.topology, 4, 1) == (
        "parallel.dp_shard = 4: groups cross nodes of 4 ranks, where communication is slower",
    )
    assert crossings(plan.topology, 4, 0) == ()  # nothing is sharded
    (crossing,) = crossings(plan.topology, 2, 0)
    assert crossing == "parallel.tp = 4: groups cross nodes of 2 ranks, where communication is slower"
