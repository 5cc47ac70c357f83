"""What goes wrong with a disk: said once, on every rank alike, and what was saved before stays whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layouts import LLAMA, plan_of
from pool import Place, Pool, RankFailed
from test_checkpoint import LR, standing

from shardwright.checkpoint.files import TensorFileWriter
from shardwright.checkpoint.folder import CheckpointFolder
from shardwright.checkpoint.load import Checkpoint
from shardwright.checkpoint.resume import newest_good
from shardwright.checkpoint.save import Saver
from shardwright.checkpoint.snapshot import Snapshot
from shardwright.data.samples import RandomSamples
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import compose
from shardwright.plan.plan import Plan
from shardwright.record.records import SaveRecord
from shardwright.train.batches import rank_batch
from shardwright.train.step import train_step

pytestmark = pytest.mark.world

Breakage = Callable[[Place, Path, pytest.MonkeyPatch], None]


def plan(on_error: str = "continue", keep: int = 2) -> Plan:
    made = plan_of(LLAMA, {"dp": 2, "zero": 3}, global_batch_size=4, micro_batch_size=1, sequence_length=5)
    spec = made.spec.model_copy(
        update={"checkpoint": made.spec.checkpoint.model_copy(update={"on_error": on_error, "keep": keep})}
    )
    return made.model_copy(update={"spec": spec})


def save_at_steps(place: Place, plan: Plan, folder: Path, breakage: Breakage | None) -> dict[str, Any]:
    """In a rank: six steps, saved after each second one; a breakage is in force for the second save."""
    mesh = place.mesh(plan.topology)
    runtime = compose(plan, mesh)
    optimizer = make_optimizer(plan.spec.train, runtime.states.owned_tensors())
    told: list[SaveRecord] = []
    warned: list[str] = []
    saver = Saver(CheckpointFolder(folder), runtime, optimizer, folder / "none", tell=told.append, warn=warned.append)
    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, seed=5)
    for step in range(1, 7):
        with pytest.MonkeyPatch.context() as patch:
            if step == 4 and breakage is not None:
                breakage(place, folder, patch)
            batch = rank_batch(runtime, samples, step - 1)
            saver.heard(*train_step(runtime, optimizer, batch, LR, votes=saver.votes()).votes)
            if step % 2 == 0:
                saver.save(standing(plan, step, step * 4, step))
                saver.drain()
    runtime.states.finish()
    return {"saved": [record.step for record in told], "warned": warned}


def disk_is_full(place: Place, folder: Path, patch: pytest.MonkeyPatch) -> None:
    def full(self: TensorFileWriter, content: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "there"))

    if place.rank == 1:
        patch.setattr(TensorFileWriter, "_put", full)


def may_not_write(place: Place, folder: Path, patch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Path:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    patch.setattr(CheckpointFolder, "begin", refused)


def directory_vanishes(place: Place, folder: Path, patch: pytest.MonkeyPatch) -> None:
    commit = CheckpointFolder.commit

    def vanishing(self: CheckpointFolder, step: int, *rest: Any) -> None:
        shutil.rmtree(self.draft(step))
        commit(self, step, *rest)

    patch.setattr(CheckpointFolder, "commit", vanishing)


def not_a_shared_file_system(place: Place, folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("shardwright.checkpoint.save._PATIENCE", 0.2)
    if place.rank == 1:
        patch.setattr("shardwright.checkpoint.save.write_part", lambda *_: None)


CASES = {
    "disk full": (disk_is_full, "checkpoint: step 4 was not saved: rank 1: {}/there: No space left on device"),
    "no permission": (may_not_write, "checkpoint: step 4 was not saved: rank 0: {}: Permission denied"),
    "vanished": (directory_vanishes, "No such file or directory"),
    "not shared": (
        not_a_shared_file_system,
        "rank 1 wrote is not there\n  all ranks must see the same file system",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_and_what_was_saved_is_whole(pool: Pool, tmp_path: Path, case: str) -> None:
    breakage, text = CASES[case]
    ranks = pool.run(2, save_at_steps, plan(), tmp_path, breakage)
    for rank in ranks:
        assert rank["saved"] == [2, 6]
        assert len(rank["warned"]) == 1 and text.format(tmp_path) in rank["warned"][0]
    assert ranks[0]["warned"] == ranks[1]["warned"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000006"]
    for path in tmp_path.iterdir():
        Checkpoint.open(path).check()


@pytest.mark.parametrize("case", ["disk full", "vanished"])
def test_training_stops_where_that_is_asked_for(pool: Pool, tmp_path: Path, case: str) -> None:
    breakage, text = CASES[case]
    with pytest.raises(RankFailed) as failed:
        pool.run(2, save_at_steps, plan("stop"), tmp_path, breakage)
    assert text.format(tmp_path) in failed.value.cause.text and "--resume" in failed.value.cause.text
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    Checkpoint.open(tmp_path / "step-00000002").check()


def test_only_the_newest_are_kept(pool: Pool, tmp_path: Path) -> None:
    pool.run(2, save_at_steps, plan(keep=1), tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


# Which checkpoint is gone on from


def chosen(place: Place, plan: Plan, folder: Path) -> tuple[str | None, list[str]]:
    told: list[str] = []
    found = newest_good(CheckpointFolder(folder), place.mesh(plan.topology), told.append)
    return found.path.name if found else None, told


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bit": (lambda path: flip(path / "rank-00001.safetensors"), "damaged: its bytes are not those that were written"),
    "cut": (lambda path: os.truncate(path / "rank-00000.safetensors", 99), "99 bytes), and"),
    "gone": (lambda path: (path / "rank-00001.safetensors").unlink(), "cannot be read: No such file"),
    "manifest": (lambda path: flip(path / "manifest.json"), "manifest.json: damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(pool: Pool, tmp_path: Path, kind: str) -> None:
    damage, text = DAMAGE[kind]
    pool.run(2, save_at_steps, plan(), tmp_path, None)
    damage(tmp_path / "step-00000006")
    for name, told in pool.run(2, chosen, plan(), tmp_path):
        assert name == "step-00000004"
        assert len(told) == 1 and told[0].startswith("step-00000006 is passed over: ") and text in told[0]
    damage(tmp_path / "step-00000004")
    with pytest.raises(RankFailed, match="none of 2 checkpoints is whole"):
        pool.run(2, chosen, plan(), tmp_path)


def test_a_checkpoint_without_a_manifest_is_named_and_a_draft_is_none(pool: Pool, tmp_path: Path) -> None:
    pool.run(2, save_at_steps, plan(keep=3), tmp_path, None)
    (tmp_path / "step-00000004").rename(tmp_path / ".saving-00000004")
    (tmp_path / "step-00000006" / "manifest.json").unlink()
    name, told = pool.run(2, chosen, plan(), tmp_path)[1]
    assert name == "step-00000002" and len(told) == 1 and "step-00000006 is passed over" in told[0]
    folder = CheckpointFolder(tmp_path)
    folder.clear()
    folder.pass_over(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000006.damaged-1"]
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    with pytest.raises(RankFailed, match="none of 1 checkpoints is whole"):  # and not a run from the beginning
        pool.run(2, chosen, plan(), tmp_path)


def run_directory_vanishes(place: Place, folder: Path, patch: pytest.MonkeyPatch) -> None:
    take = Snapshot.take

    def taking(self: Snapshot) -> None:
        take(self)
        shutil.rmtree(folder, ignore_errors=True)

    patch.setattr(Snapshot, "take", taking)


def test_a_run_that_was_removed_does_not_come_back_in_part(pool: Pool, tmp_path: Path) -> None:
    ranks = pool.run(2, save_at_steps, plan(), tmp_path / "gone", run_directory_vanishes)
    for rank in ranks:
        assert rank["saved"] == [2] and len(rank["warned"]) == 2
        assert "No such file or directory" in rank["warned"][0]
    assert not (tmp_path / "gone").exists()


def test_a_good_save_whose_elder_cannot_be_deleted_is_good(pool: Pool, tmp_path: Path) -> None:
    ranks = pool.run(2, save_at_steps, plan(keep=1), tmp_path, elder_stays)
    assert ranks[0]["saved"] == [2, 4, 6] and "an older one could not be deleted" in ranks[0]["warned"][0]


def elder_stays(place: Place, folder: Path, patch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    patch.setattr(CheckpointFolder, "prune", refused)
