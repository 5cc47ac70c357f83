"""A run that goes on: which one, and what is asked of it now that was not asked before."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shardwright.errors import RunError
from shardwright.plan.plan import Plan
from shardwright.spec.inherited import differences
from shardwright.spec.problems import show
from shardwright.train.directory import RunDirectory

_MOST = 12  # changed fields that are listed


def earlier_run(recipe: str, run_dir: str | None) -> RunDirectory | None:
    """The run to go on with: in the directory asked for, or the recipe's newest; None where there is none yet."""
    found = RunDirectory(Path(run_dir)) if run_dir else RunDirectory.newest(Path(recipe))
    if found is not None and found.holds_run:
        return found
    where = run_dir or f"runs/{Path(recipe).stem}-*"
    print(f"--resume: no run in {where} yet: this one starts from the beginning", file=sys.stderr)
    return None


def changes_since(earlier: RunDirectory, plan: Plan) -> tuple[str, ...]:
    """The fields in which a plan asks for something else than the run did before.

    Raises RecipeError or RunError for a change after which what was saved would be of no use.
    """
    if earlier.newest_checkpoint() is None:
        return ()
    try:
        before = earlier.read_plan()
    except (OSError, ValueError, ValidationError):
        raise RunError(
            f"{earlier.plan}: not the plan of a run of this version",
            "start a new run with model.init_from = one of its checkpoints",
        ) from None
    told = differences(before.architecture.model_dump(mode="json"), plan.architecture, str(earlier.path))
    asked, had = plan.spec.train.optimizer, before.spec.train.optimizer
    if asked != had:
        raise RunError(
            f"train.optimizer: {show(asked)}, and {show(had)} in {earlier.path}, whose state it cannot use",
            f"go on with train.optimizer = {show(had)}, or start anew with model.init_from = a checkpoint of it",
        )
    now, then = _flat(plan.spec.model_dump(mode="json")), _flat(before.spec.model_dump(mode="json"))
    if plan.world_size != before.world_size:
        now["ranks"], then["ranks"] = plan.world_size, before.world_size
    changed = [
        f"{name} = {show(now.get(name))}, was {show(then.get(name))}"
        for name in sorted(now | then)
        if now.get(name) != then.get(name) and not name.startswith("model.")
    ]
    left = len(changed) - _MOST
    return (*told, *changed[:_MOST], *([f"and {left} more"] if left > 0 else []))


def _flat(tables: dict[str, Any]) -> dict[str, Any]:
    """Dotted fields of a recipe's tables."""
    return {f"{section}.{name}": value for section, fields in tables.items() for name, value in fields.items()}
