"""A comparison from its recipe to its table: rows one after the other, each on fresh processes."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from shardwright import __version__
from shardwright.comm.job import Job
from shardwright.comm.launch import launch
from shardwright.comm.machine import default_device
from shardwright.compare.row import row_of
from shardwright.cost.hardware import hardware_named
from shardwright.errors import LayoutError, RunError, ShardwrightError
from shardwright.plan.compared import derived
from shardwright.plan.describe import layout
from shardwright.plan.fit import with_fields
from shardwright.plan.machine import num_cores
from shardwright.plan.plan import Plan
from shardwright.plan.techniques import Technique, chosen
from shardwright.plan.world import local_world_size
from shardwright.record.store import read_json, write_json
from shardwright.spec.load import load
from shardwright.spec.spec import Spec
from shardwright.train.prepare import open_data, plan_for
from shardwright.units import Bytes
from shardwright.verify.run import gate_plan

_MOST_RANKS = 32
_PROVEN = 2


@dataclass(frozen=True)
class Asked:
    """What was asked of `compare`: `world` None is as many ranks as the recipe itself takes here."""

    recipe: str
    overrides: tuple[str, ...] = ()
    world: int | None = None
    only: tuple[str, ...] = ()
    steps: int = 5
    hardware: str = "H100-SXM"
    bytes_per_rank: Bytes | None = None
    directory: str | None = None
    again: bool = False


def compare(asked: Asked, progress: bool = True) -> dict[str, Any]:
    """The document of a comparison; written to `comparison.json` in its directory after every row.

    Rows that are in the directory already, of the same plan and the same version, are kept. Raises ShardwrightError for
    what can be refused before ranks start; KeyboardInterrupt where a row was stopped by a signal.
    """
    techniques, hardware = chosen(asked.only), hardware_named(asked.hardware)
    spec = _without_saving(load(asked.recipe, asked.overrides))
    device = default_device() if spec.run.device == "auto" else spec.run.device
    world = asked.world or local_world_size(spec, cores=num_cores(), gpus=torch.cuda.device_count())
    if not 1 <= world <= max(_MOST_RANKS, torch.cuda.device_count()):
        raise LayoutError(f"--world: {world} ranks on one machine", f"what works: 1 to {_MOST_RANKS}")
    vocab = spec.model.vocab if spec.data.corpus == "random" else open_data(spec, spec.model.vocab).vocab
    directory = _directory(asked)
    plans = {technique.name: _planned(technique, spec, world, device, vocab) for technique in techniques}
    rows: list[dict[str, Any]] = []
    document = {
        "recipe": asked.recipe,
        "overrides": list(asked.overrides),
        "world": world,
        "device": device,
        "cores": num_cores(),
        "version": __version__,
        "rows": rows,
    }
    with _bar(progress) as bar:
        task = bar.add_task("compare", total=len(techniques), what="")
        for technique in techniques:
            bar.update(task, what=technique.name)
            if not bar.console.is_terminal and progress:
                bar.console.print(f"{len(rows) + 1}/{len(techniques)} {technique.name}")
            made = plans[technique.name]
            row = {"name": technique.name, "reason": made} if isinstance(made, str) else None
            row = row or _measured(technique, made, directory, asked)  # type: ignore[arg-type]
            rows.append(row)
            write_json(directory / "comparison.json", document)
            bar.advance(task)
    architecture = next((plan.architecture for plan in plans.values() if isinstance(plan, Plan)), None)
    if architecture is None:
        raise LayoutError(f"--world: no technique can be had on {world} ranks", rows[0]["reason"])
    usable = asked.bytes_per_rank or hardware.usable
    document |= {"derived": derived(techniques, rows, spec, architecture, world, hardware, usable)}
    document |= {"hardware": hardware.name, "usable": usable, "directory": str(directory)}
    write_json(directory / "comparison.json", document)
    return document


def _without_saving(spec: Spec) -> Spec:
    return with_fields(spec, {"checkpoint.every": 0})


def _planned(technique: Technique, spec: Spec, world: int, device: str, vocab: int | None) -> Plan | str:
    """The technique's plan, or why there is none."""
    try:
        return plan_for(technique.applied(spec, world), 1 if technique.single else world, device, vocab)
    except ShardwrightError as error:
        return error.problem


def _directory(asked: Asked) -> Path:
    path = Path(asked.directory) if asked.directory else Path("runs") / f"compare-{Path(asked.recipe).stem}"
    try:
        (path / "rows").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--run-dir: {path} cannot be written: {error.strerror}", "give another --run-dir") from None
    return path


def _measured(technique: Technique, plan: Plan, directory: Path, asked: Asked) -> dict[str, Any]:
    """A row that exists: kept from before, or measured now."""
    kept = directory / "rows" / f"{technique.slug}.json"
    text = f"{__version__} {torch.__version__} {asked.steps} {plan.model_dump_json()}"
    key = hashlib.sha256(text.encode()).hexdigest()
    if not asked.again and (row := _kept(kept)).get("key") == key:
        return row
    with tempfile.TemporaryDirectory(prefix="shardwright-compare-") as temporary:
        folder = Path(temporary)
        row = {
            "name": technique.name,
            "key": key,
            "layout": layout(plan),
            "measured_at": time.strftime("%Y-%m-%d %H:%M"),
        }
        code = _launched(plan, folder, asked.steps)
        if code > 128:
            raise KeyboardInterrupt
        if code:
            return row | {"reason": f"its ranks failed (exit code {code}); the cause stands above"}
        row |= row_of(plan, gate_plan(plan), folder, _PROVEN)
        shutil.copytree(folder, directory / "rows" / technique.slug, dirs_exist_ok=True, ignore=_not_ledgers)
    write_json(kept, row)
    return row


def _kept(path: Path) -> dict[str, Any]:
    """The row of a file; an empty one where there is none, or it was damaged."""
    try:
        row = read_json(path)
    except (OSError, ValueError):
        return {}
    return row if isinstance(row, dict) else {}


def _not_ledgers(path: str, names: list[str]) -> list[str]:
    """The traces of proofs are large, and of no more use."""
    return [name for name in names if name == "proof"]


def _launched(plan: Plan, folder: Path, steps: int) -> int:
    (folder / "proof").mkdir()
    write_json(folder / "plan.json", plan.model_dump(mode="json"))
    write_json(folder / "proof" / "plan.json", gate_plan(plan).model_dump(mode="json"))
    return launch(
        Job(
            world_size=plan.world_size,
            entry="shardwright.compare.rank",
            arguments=(str(folder), str(steps), str(_PROVEN)),
            device=plan.device,
            backend=plan.spec.run.backend,
            collective_timeout=plan.spec.run.collective_timeout_seconds,
        )
    )


def _bar(shown: bool) -> Progress:
    console = Console(file=sys.stderr)
    hidden = not (shown and console.is_terminal)
    columns = (TextColumn("{task.completed}/{task.total}"), BarColumn(bar_width=24), TextColumn("{task.fields[what]}"))
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=hidden)


def show(document: dict[str, Any], as_json: bool) -> int:
    """Print a comparison and write its page; the exit code is 1 where a row failed or was refuted."""
    from shardwright.report.comparison import print_comparison
    from shardwright.report.files import write_comparison

    if as_json:
        json.dump(document, sys.stdout, indent=2)
        print()
    else:
        console = Console(highlight=False)
        print_comparison(document, console if console.is_terminal else Console(highlight=False, width=160))
    try:
        page = Text(f"page: {write_comparison(Path(document['directory']))}")
    except RunError as error:
        page = Text(f"no page: {error.problem}", "yellow")
    Console(highlight=False, stderr=as_json).print(page, soft_wrap=True)
    failed = any("failed" in row.get("reason", "") for row in document["rows"])
    refuted = any(not row["proof"]["passed"] for row in document["rows"] if "proof" in row)
    return 1 if failed or refuted else 0
