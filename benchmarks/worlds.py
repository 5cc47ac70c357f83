"""A program run for many plans: those of one world size share one world of ranks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardwright.comm.job import Job
from shardwright.comm.launch import launch
from shardwright.plan.plan import Plan
from shardwright.record.store import write_json


def launched(plans: Sequence[Plan], entry: str, arguments: tuple[str, ...], folder: Path, **job: Any) -> list[Path]:
    """Run a program, its arguments followed by folders with a plan.json each; the folders, one for each plan.

    `job`: further fields of the jobs, by default on the plans' device. Exits with the code of one that fails.
    """
    folders = [folder / str(index) for index in range(len(plans))]
    for plan, path in zip(plans, folders, strict=True):
        path.mkdir()
        write_json(path / "plan.json", plan.model_dump(mode="json"))
    for world in sorted({plan.world_size for plan in plans}):
        own = [str(path) for plan, path in zip(plans, folders, strict=True) if plan.world_size == world]
        print(f"{len(own)} layouts on {world} ranks", file=sys.stderr, flush=True)
        if code := launch(Job(world, entry, (*arguments, *own), **{"device": plans[0].device} | job)):
            raise SystemExit(code)
    return folders
