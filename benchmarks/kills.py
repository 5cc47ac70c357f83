"""Ranks killed at random moments of small runs, which must end as if nothing had happened.

    python -m benchmarks.kills [--kills 50] [--seed 0] [--record]

Each kill is a run of its own: `shardwright train` on 4 ranks, dp 2 x pp 2, saving every third of its 30 steps. One rank
gets SIGKILL, in every second run certainly while a checkpoint is half written; the ranks are started anew and go on.
The run must end with 0, every step must be in steps.jsonl once with the loss of a run that was left alone, and the last
checkpoint must have its tensors to the bit. No process, no temporary folder and no half a checkpoint may be left. The
exit code is 1 if any run differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import RECORDS, environment
from benchmarks.proof import table
from benchmarks.watched import STEPS, WORLD_SIZE, Run, differences, left_by, prepare
from shardwright.train.directory import RunDirectory

LAYOUTS = [
    ("parallel.zero=0", "memory.offload=none"),
    ("parallel.zero=1", "memory.offload=state"),
    ("parallel.zero=2", "memory.offload=none"),
    ("parallel.zero=3", "memory.offload=update"),
    ("parallel.zero=0", "memory.offload=update"),
    ("parallel.zero=1", "memory.offload=none"),
    ("parallel.zero=2", "memory.offload=state"),
    ("parallel.zero=3", "memory.offload=none"),
]
AS_IF_LEFT_ALONE = "as if left alone"
_ENDS = (".safetensors", ".json")
_POLL = 0.004  # seconds between two looks at a run; a save of this size takes some tens of them


@dataclass(frozen=True)
class Kill:
    """A rank that is to be killed: some seconds after its run has reached a step, or, if it is to be `saving`, after
    the next draft of a checkpoint is there. Step 0: after the ranks are there."""

    rank: int
    step: int
    saving: bool
    delay: float

    @staticmethod
    def draw(draw: random.Random, saving: bool, first: int = 0, last: int = STEPS) -> Kill:
        """A random one, while the run is between two steps."""
        step = draw.randrange(first, last)
        most = 0.3 if saving else 3.0 if step == 0 else 0.2
        return Kill(draw.randrange(WORLD_SIZE), step, saving, draw.uniform(0, most))

    def strike(self, run: Run, attempt: int = 0) -> dict[str, Any] | None:
        """Wait for the moment and kill the rank; what was going on, or None if the moment did not come."""
        if not wait_for(run, lambda: len(run.ranks(attempt)) == WORLD_SIZE):
            return None
        ranks = run.ranks(attempt)
        if not wait_for(run, lambda: run.step() >= self.step and bool(run.drafts() or not self.saving)):
            return None
        time.sleep(self.delay)
        step, drafts = run.step(), [_told(draft) for draft in run.drafts()]
        if self.rank not in run.ranks(attempt):
            return None
        os.kill(ranks[self.rank], signal.SIGKILL)
        return {"rank": self.rank, "step": step, "saving": ", ".join(drafts)}


def wait_for(run: Run, met: Callable[[], bool]) -> bool:
    """Wait for a moment of a run; False if it ends before."""
    while not met():
        if run.has_ended():
            return False
        time.sleep(_POLL)
    return True


def _told(draft: Path) -> str:
    """Which checkpoint is half written or deleted, and how far it is."""
    try:
        names = [path.name for path in draft.iterdir()]
    except OSError:  # just gone
        names = []
    files, parts = (sum(name.startswith("rank-") and name.endswith(end) for name in names) for end in _ENDS)
    manifest = ", manifest" if "manifest.json" in names else ""
    return f"{draft.name[1:]}: {files} files, {parts} parts{manifest}"


@dataclass(frozen=True)
class Killed:
    """What became of a run: what went on at each kill (None: its moment did not come), how often the ranks were
    started, what is not as it should be, and what the run said."""

    struck: list[dict[str, Any] | None]
    attempts: int
    problems: list[str]
    text: str


def killed_run(folder: Path, name: str, layout: Sequence[str], kills: Sequence[Kill], straight: RunDirectory) -> Killed:
    """A run through all the kills, and in what it differs from one of its layout that was left alone."""
    run = Run(folder, name, *layout, f"run.max_restarts={len(kills)}")
    try:
        struck = [kill.strike(run, attempt) for attempt, kill in enumerate(kills)]
        code = run.end()
        problems = [*([f"exit code {code}"] if code else []), *left_by(run)]
        problems = problems or list(differences(run.directory, straight))
        return Killed(struck, 1 + run.text.count("starting all ranks anew"), problems, run.text)
    finally:
        run.close()


def straight_run(folder: Path, layout: Sequence[str]) -> RunDirectory:
    """A run of a layout that is left alone; made once for each."""
    name = "straight-" + "-".join(option.rpartition("=")[2] for option in layout)
    directory = RunDirectory(folder / name)
    if not directory.holds_run:
        run = Run(folder, name, *layout)
        try:
            if run.end():
                raise SystemExit(run.text)
        finally:
            run.close()
    return directory


def kill_many(folder: Path, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """One row for each kill, each in a run of its own. A moment that did not come is drawn again."""
    draw = random.Random(seed)
    tries = done = 0
    while done < count:
        layout, kill = LAYOUTS[done % len(LAYOUTS)], Kill.draw(draw, saving=done % 2 == 0)
        found = killed_run(folder, f"run-{tries}", layout, [kill], straight_run(folder, layout))
        tries += 1
        [struck] = found.struck
        if struck is None or (found.attempts == 1 and not found.problems):  # it came after the rank's end
            continue
        done += 1
        names = dict(option.rpartition(".")[2].split("=") for option in layout)
        result = "; ".join(found.problems) or AS_IF_LEFT_ALONE
        if found.problems:
            print(found.text, file=sys.stderr)
        yield {"kill": done, **names, **struck, "attempts": found.attempts, "result": result}


def main() -> int:
    """Kill, print the table, and keep it with --record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="keep the table under benchmarks/records/")
    arguments = parser.parse_args()
    began, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for row in kill_many(Path(folder), arguments.kills, arguments.seed):
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    good = sum(row["result"] == AS_IF_LEFT_ALONE for row in rows)
    print(table(rows))
    half = sum(bool(row["saving"]) for row in rows)
    said = (
        f"{good} of {len(rows)} killed runs ended as if left alone, {half} of them killed with half a checkpoint there"
    )
    print(f"\n{said} ({time.perf_counter() - began:.0f} s)")
    if arguments.record:
        command = f"python -m benchmarks.kills --kills {arguments.kills} --seed {arguments.seed} --record"
        record = {"command": command, "environment": environment(WORLD_SIZE), "rows": rows}
        (RECORDS / "kills.json").write_text(json.dumps(record, indent=1) + "\n")
        (RECORDS / "kills.md").write_text(f"`{command}`: {said}\n\n{table(rows)}\n")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
