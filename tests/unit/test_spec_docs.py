"""docs/recipes.md names every field, with its default, in the order of the models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from shardwright.spec.model import RopeScaling
from shardwright.spec.presets import PRESETS
from shardwright.spec.problems import show
from shardwright.spec.spec import Spec

TEXT = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
SECTIONS = {name: field.annotation for name, field in Spec.model_fields.items()} | {"model.rope_scaling": RopeScaling}


def rows(section: str) -> list[tuple[str, str]]:
    """(field, default) of the table below a section's title."""
    body = re.split(r"^#+ \[", TEXT.partition(f"# [{section}]\n")[2], maxsplit=1, flags=re.M)[0]
    cells = [[cell.strip() for cell in line.split("|")] for line in body.splitlines() if line.startswith("| `")]
    return [(row[1].strip("`"), row[3]) for row in cells]


@pytest.mark.parametrize("section", SECTIONS)
def test_fields_and_defaults(section: str) -> None:
    model = SECTIONS[section]
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    documented = rows(section)
    assert [field for field, _ in documented] == list(model.model_fields)
    for name, default in documented:
        field = model.model_fields[name]
        if field.is_required() or field.default is None:
            assert default.startswith("*"), name  # required, or derived in the architecture
        else:
            assert default == f"`{show(field.default)}`", name


def test_presets_are_named() -> None:
    named = re.findall(r"`([^`]+)`", TEXT.partition("### Presets\n")[2].partition("###")[0])
    assert named == list(PRESETS)
