"""Cases that memory does not hold at once are raced in groups, and compared within them."""

from __future__ import annotations

from benchmarks.grouping import grouped, takes
from benchmarks.harness import Case, Peak, Result, check_losses, table
from shardwright.units import Bytes


def _case(name: str, *peers: str, ceiling: str = "") -> Case:
    return Case(name, "", lambda rank, world: lambda step: 0.0, peers, ceiling, bound=name.startswith("top"))


CASES = [_case("p"), _case("q"), _case("a", "p", ceiling="top a"), _case("top a")]
CASES += [_case("b", "p", "q", ceiling="top b"), _case("top b"), _case("alone")]
SIZES = {"p": 2, "q": 2, "a": 3, "top a": 3, "b": 3, "top b": 3, "alone": 1}


def _names(room: int | None) -> list[list[str]]:
    return [[c.name for c in group] for group in grouped(CASES, SIZES, None if room is None else Bytes(room))]


def test_all_at_once_where_they_fit() -> None:
    everything = [[case.name for case in CASES]]
    assert _names(None) == _names(17) == everything


def test_a_peer_is_in_every_group_that_needs_it() -> None:
    assert _names(16) == [["p", "q", "a", "top a", "b", "top b"], ["alone"]]
    assert _names(15) == [["p", "a", "top a"], ["p", "q", "b", "top b", "alone"]]
    assert _names(10) == [["p", "a", "top a"], ["p", "q", "b", "top b"], ["alone"]]


def test_what_cannot_be_apart_stays_together() -> None:
    assert _names(1) == [["p", "a", "top a"], ["p", "q", "b", "top b"], ["alone"]]


def test_a_ceiling_takes_what_its_case_does() -> None:
    memory = [Peak(case.name, [1, 1], [1 + SIZES[case.name], 1 + SIZES[case.name]]) for case in CASES if not case.bound]
    assert takes(CASES, memory) == {name: 2 * size for name, size in SIZES.items()}


def test_ratios_are_within_a_group() -> None:
    results = [
        Result("p", "", (), "", [5.0], [4.0, 4.0], 0),
        Result("a", "", ("p",), "", [5.0], [2.0, 2.0], 0),
        Result("p", "", (), "", [5.0], [9.0, 9.0], 1),
        Result("b", "", ("p", "a"), "", [5.0], [3.0, 3.0], 1),
    ]
    check_losses(results, 1e-5)
    lines = table(results, 1).splitlines()
    assert "| **2.00** (2.00 to 2.00) p |" in lines[3]
    assert "| **3.00** (3.00 to 3.00) p |" in lines[5] and " a |" not in lines[5]
    assert "Raced in 2 groups" in lines[7]
