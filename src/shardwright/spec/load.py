"""Recipes: a TOML file and dotted overrides, read into a `Spec`."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shardwright.errors import RecipeError
from shardwright.spec.problems import as_recipe_error, nearest
from shardwright.spec.spec import Spec

_LINE = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """The recipe at `path` with overrides such as "parallel.tp=2" over it, in their order.

    Raises RecipeError, which names every field that is wrong.
    """
    data = _read(Path(path))
    for override in overrides:
        apply_override(data, override)
    return build(data)


def build(data: dict[str, Any]) -> Spec:
    """The Spec of a recipe's tables. Raises RecipeError, which names every field that is wrong."""
    try:
        return Spec.model_validate(data)
    except ValidationError as error:
        raise as_recipe_error(error) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe", _nearest_recipe(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecipeError(f"{path}: cannot be read: {reason}", _nearest_recipe(path)) from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _not_toml(path, text, str(error)) from None


def _not_toml(path: Path, text: str, message: str) -> RecipeError:
    """Where the TOML breaks, with the line itself."""
    lines = text.splitlines() or [""]
    place = _LINE.search(message)
    number = min(int(place[1]) if place and place[1] else len(lines), len(lines))
    reason = _LINE.sub("", message)
    return RecipeError(f"{path}, line {number}: not TOML: {reason}", f"the line reads: {lines[number - 1].strip()}")


def _nearest_recipe(path: Path) -> str:
    """The recipe with the nearest name, in the folder asked for or else in recipes/ or here."""
    folders = [path if path.is_dir() else path.parent, Path("recipes"), Path()]
    files = [file for folder in reversed(folders) if folder.is_dir() for file in sorted(folder.glob("*.toml"))]
    found = {file.stem: file for file in files if file.name != "pyproject.toml"}
    near = nearest(path.stem, found)
    if near:
        return f"did you mean {found[near]}?"
    if found:
        return "recipes here: " + ", ".join(str(file) for file in found.values())
    return "give the path of a .toml file"


def apply_override(data: dict[str, Any], override: str) -> None:
    """Writes one override into the recipe's tables."""
    name, equals, text = override.partition("=")
    path = [part.strip() for part in name.split(".")]
    if not equals or not all(path):
        raise RecipeError(f'"{override}": not an override', "write it like section.field=value, e.g. train.steps=50")
    table = data
    for depth, part in enumerate(path[:-1]):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"{'.'.join(path)}: {'.'.join(path[: depth + 1])} is not a table", "see docs/recipes.md")
    table[path[-1]] = _value(text.strip())


def _value(text: str) -> Any:
    """A TOML value, or the bare text where it is none."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text
