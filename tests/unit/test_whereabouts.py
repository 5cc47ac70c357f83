"""What a hang's report says, and what a rank's page shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardwright.comm.cause import Cause, Kind, first_cause, is_hang
from shardwright.comm.hang import named, report
from shardwright.comm.ledger import CommunicationLedger
from shardwright.comm.watch import StreamWhereabouts, Watch
from shardwright.comm.whereabouts import Sighting, Whereabouts, shared_page
from shardwright.schedule.action import Action
from shardwright.schedule.action import Kind as Act
from shardwright.units import Seconds

RECEIVE = "receive along pp for pipeline/gradient"
TIMEOUT = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms for recv"


def test_a_report_names_the_rank_that_is_in_no_collective_and_those_not_seen() -> None:
    seen = {
        2: Sighting("B stage 0 microbatch 3", RECEIVE, Seconds(599)),
        0: Sighting("B stage 0 microbatch 3", RECEIVE, Seconds(600)),
        1: Sighting("F stage 1 microbatch 0", "", Seconds(601)),
    }
    assert report(Seconds(600), 5, seen).splitlines() == [
        "run.collective_timeout: a collective did not end within 10 min 00 s",
        f"  ranks 0, 2: B stage 0 microbatch 3, waits in {RECEIVE} for 10 min 00 s",
        "  rank 1: F stage 1 microbatch 0, in no collective for 10 min 01 s",
        "  ranks 3-4: not seen",
        "  ranks 1, 3-4 are in no collective: look there first; "
        "if that is slow and not stuck, raise run.collective_timeout",
    ]


def test_a_report_of_ranks_that_all_wait_in_one_place() -> None:
    seen = dict.fromkeys(range(2), Sighting("update", "all_reduce along world for health", Seconds(2)))
    assert report(Seconds(2), 2, seen).splitlines()[1:] == [
        "  ranks 0-1: update, waits in all_reduce along world for health for 2 s",
        "  all wait in the same collective: look at the network between them",
    ]


def test_ranks_in_few_words() -> None:
    assert [named([3]), named([0, 1, 2, 5]), named([1, 3])] == ["rank 3", "ranks 0-2, 5", "ranks 1, 3"]


class Work:
    """Torch's, as it looks to another process while it is waited for, and as it fails."""

    def __init__(self, page: Path, error: Exception | None = None) -> None:
        self.page, self.error, self.seen = page, error, Sighting("", "", Seconds(0))

    def wait(self) -> None:
        self.seen = Sighting.of(self.page.read_bytes())
        if self.error is not None:
            raise self.error


def test_a_page_shows_the_action_and_the_collective_while_it_is_waited_for(tmp_path: Path) -> None:
    whereabouts = Whereabouts(shared_page(tmp_path / "page"))
    ledger = CommunicationLedger(whereabouts=whereabouts)
    whereabouts.begin(Action(Act.BACKWARD, 1, 3).in_words)
    work = Work(tmp_path / "page")
    call = ledger.call("receive", "pp", "pipeline/gradient")
    assert Sighting.of(whereabouts.page).waiting == RECEIVE, "posting it may take long too"
    call.posted()
    assert not Sighting.of(whereabouts.page).waiting
    call.wait([work])
    assert (work.seen.doing, work.seen.waiting) == ("B stage 1 microbatch 3", RECEIVE)
    assert 0 <= work.seen.seconds < 5
    after = Sighting.of(whereabouts.page)
    assert (after.doing, after.waiting) == ("B stage 1 microbatch 3", "")
    assert not ledger.rows, "a receive sends nothing"


def test_a_failed_wait_stays_on_the_page(tmp_path: Path) -> None:
    ledger = CommunicationLedger(whereabouts=Whereabouts(shared_page(tmp_path / "page")))
    with pytest.raises(RuntimeError, match="Timed out"):
        ledger.call("receive", "pp", "pipeline/gradient").wait([Work(tmp_path / "page", RuntimeError(TIMEOUT))])
    ledger.call("all_reduce", "world", "on/the/way/out").wait([Work(tmp_path / "page")])
    ledger.whereabouts.begin("cleanup")
    seen = Sighting.of((tmp_path / "page").read_bytes())
    assert (seen.doing, seen.waiting) == ("start", RECEIVE)


def test_a_timeout_is_a_hang_which_tells_more_than_an_echo_and_less_than_a_cause() -> None:
    hang = Cause.of_exception(0, RuntimeError(TIMEOUT))
    assert hang.kind is Kind.HANG
    assert "rank 0 waited in a collective until its timeout" in hang.told()
    assert is_hang(RuntimeError("Wait timeout"))
    assert is_hang(RuntimeError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)"))
    assert not is_hang(TimeoutError("timed out"))
    echo, defect = Cause(1, Kind.ECHO, 0.0, "closed"), Cause(2, Kind.EXCEPTION, 9e9, "a defect")
    assert first_cause([echo, hang]) is hang
    assert first_cause([echo, hang, defect]) is defect
    assert [cause.may_follow for cause in (echo, hang, defect)] == [True, True, False]


class Event:
    """CUDA's, without a GPU: it has come to pass when a test says so."""

    made: list[Event]

    def __init__(self, device: str) -> None:
        self.made.append(self)
        self.passed = False

    def record(self) -> None:
        self.passed = False

    def query(self) -> bool:
        return self.passed


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    Event.made = []
    monkeypatch.setattr(torch, "Event", Event)
    return Event.made


def test_a_gpu_is_where_its_oldest_event_is(events: list[Event], tmp_path: Path) -> None:
    whereabouts = StreamWhereabouts()
    ledger = CommunicationLedger(whereabouts=whereabouts)
    for action, reason in (("F stage 0 microbatch 0", "zero/first"), ("F stage 0 microbatch 1", "zero/second")):
        whereabouts.begin(action)
        ledger.call("all_gather", "shard", reason).wait([])
    whereabouts.begin("update")  # the host has gone on
    assert whereabouts.look() > 0
    assert Sighting.of(whereabouts.page).waiting.endswith("zero/first")
    events[0].passed = True
    whereabouts.look()
    seen = Sighting.of(whereabouts.page)
    assert (seen.doing, seen.waiting) == ("F stage 0 microbatch 1", "all_gather along shard for zero/second")
    events[1].passed = True
    assert whereabouts.look() == 0
    assert Sighting.of(whereabouts.page).doing == "update"
    for _ in range(1000):
        ledger.call("all_gather", "shard", "zero/third").wait([])
        for event in events:
            event.passed = True
    assert len(events) < 100, "events are used again"


def test_a_watch_says_when_a_rank_has_stood_too_long(events: list[Event]) -> None:
    whereabouts = StreamWhereabouts()
    overdue: list[Sighting] = []
    watch = Watch(whereabouts, Seconds(0.1), lambda: overdue.append(Sighting.of(whereabouts.page)))
    watch.start()
    watch.join(0.3)
    assert watch.is_alive() and not overdue, "in no collective a rank may be as long as it likes"
    CommunicationLedger(whereabouts=whereabouts).call("barrier", "world", "end").wait([])
    watch.join(10)
    assert [seen.waiting for seen in overdue] == ["barrier along world for end"]
    watch.close()
