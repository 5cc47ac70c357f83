"""A race is fair: every contender trains the same model on the same tokens to the same losses."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.__main__ import races
from benchmarks.harness import Result, check_losses, race, table
from benchmarks.race import data, pipeline, setting, tensor, three_d
from benchmarks.race.setting import MODELS, Model, Race, Setting

pytestmark = pytest.mark.world

TINY = Model({"layers": 4, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96, "vocab": 256}, 32, "tiny")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_case_is_beside_cases_that_run(model: str, dtype: str) -> None:
    for found in races(Setting(model, dtype)):
        names = [case.name for case in found.cases]
        assert len(set(names)) == len(names)
        for case in found.cases:
            assert {*case.peers, case.ceiling} - {""} <= set(names), case.name
            assert bool(case.peers) == bool(case.ceiling) and case.name not in case.peers


@pytest.mark.parametrize("races_of", [data.races, tensor.races, pipeline.races, three_d.races])
def test_all_train_the_same(monkeypatch: pytest.MonkeyPatch, races_of: Callable[[Setting], list[Race]]) -> None:
    """Three steps: the second and the third see what clipping, decay and averaging did."""
    monkeypatch.setitem(setting.MODELS, "tiny", TINY)
    found = races_of(Setting("tiny", "fp32"))
    world = found[0].world
    cases = {case.name: case for one in found for case in one.cases}
    results = race(list(cases.values()), world=world, rounds=1, steps=1)
    check_losses(results, 1e-4)
    assert all(len(result.seconds) == 1 for result in results)
    rows = table(results, found[0].tokens).splitlines()
    assert len(rows) == len(cases) + 2


def test_contenders_that_differ_are_told() -> None:
    same = [
        Result("a", "", (), "", [5.5, 5.0]),
        Result("b", "", ("a",), "", [5.5001, 5.0001]),
        Result("c", "", (), "", []),
    ]
    assert check_losses(same, 1e-3) == "losses of the first steps: 5.5000 to 5.5001, 5.0000 to 5.0001"
    with pytest.raises(SystemExit, match=r"step 1 differ by more than 0\.001 of them: a 5\.00000, b 5\.10000"):
        check_losses([same[0], Result("b", "", ("a",), "", [5.5, 5.1])], 1e-3)
