"""pydantic's findings in a recipe, told as Shardwright's errors: the dotted field, its value, the way out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from shardwright.errors import RecipeError
from shardwright.spec.section import FieldProblem
from shardwright.spec.spec import Spec

_KINDS = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a table",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def show(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, tuple | list):
        return "[" + ", ".join(show(item) for item in value) + "]"
    return json.dumps(value, default=str, ensure_ascii=False)


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `names` that was probably meant, if any comes close."""
    return next(iter(get_close_matches(name, list(names), n=1, cutoff=cutoff)), None)


def as_recipe_error(error: ValidationError, model: type[BaseModel] = Spec, prefix: str = "") -> RecipeError:
    """All findings in one RecipeError: each field once, a line for the problem and a line for the way out."""
    found: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(prefix + _field(model, detail["loc"]), []).append(detail)
    inside = {field.partition("[")[0] for field in found if "[" in field}
    pairs = [_describe(model, prefix, field, found[field]) for field in found if field not in inside]
    rest = [f"{problem}\n  {way_out}" for problem, way_out in pairs[1:]]
    return RecipeError(pairs[0][0], "\n".join([pairs[0][1], *rest]))


def _submodel(model: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    """The section that a field holds, or None for a plain field."""
    field = model.model_fields.get(name) if model else None
    candidates = getattr(field and field.annotation, "__args__", ()) or (field and field.annotation,)
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _field(model: type[BaseModel], location: Sequence[str | int]) -> str:
    """The dotted field of a pydantic location, which also names branches of unions and validators."""
    names: list[str] = []
    here: type[BaseModel] | None = model
    for part in location:
        if here is None:
            break
        names.append(str(part))
        here = _submodel(here, str(part))
    indices = [f"[{part}]" for part in location[len(names) :] if isinstance(part, int)]
    return ".".join(names) + "".join(indices)


def _describe(model: type[BaseModel], prefix: str, field: str, details: Sequence[ErrorDetails]) -> tuple[str, str]:
    """The problem and the way out of one field."""
    kinds = {detail["type"]: detail for detail in details}
    value = show(details[0]["input"])
    if "extra_forbidden" in kinds:
        return _unknown(model, prefix, field)
    if kinds.keys() & {"too_short", "too_long"} or ("missing" in kinds and field.endswith("]")):
        field = field.partition("[")[0]
        return f"{field}: {value} has the wrong length", _example(model, prefix, field)
    if "missing" in kinds:
        return f"{field}: required, and not given", f"write it in [{field.rpartition('.')[0] or field}]"
    for detail in details:
        problem = detail.get("ctx", {}).get("error")
        if isinstance(problem, FieldProblem):
            return f"{field}: {problem.problem}", problem.way_out
    choices = kinds["literal_error"].get("ctx", {})["expected"] if "literal_error" in kinds else ""
    bounds = [_bound(detail) for kind, detail in kinds.items() if kind in _BOUNDS]
    if bounds:
        return f"{field}: {value} is out of range", f"it must be {', or '.join([*bounds, *_options(choices)])}"
    if "literal_error" in kinds and len(kinds) == 1:
        return f"{field}: {value} is not one of its choices", f"one of: {', '.join(_options(choices))}"
    expected = [_KINDS.get(kind, "valid here") for kind in kinds if kind != "literal_error"]
    return f"{field}: {value} is not {' or '.join([*expected, *_options(choices)])}", _example(model, prefix, field)


def _bound(detail: ErrorDetails) -> str:
    """ "at least 1": the limit that a value missed."""
    key, words = _BOUNDS[detail["type"]]
    return f"{words} {detail.get('ctx', {})[key]:g}"


def _options(expected: str) -> list[str]:
    """Choices out of pydantic's "'a', 'b' or 'c'", quoted as TOML quotes them."""
    return expected.replace(" or ", ", ").replace("'", '"').split(", ") if expected else []


def _example(model: type[BaseModel], prefix: str, field: str) -> str:
    """How the field is written, after its default."""
    here: type[BaseModel] | None = model
    *sections, name = field.removeprefix(prefix).partition("[")[0].split(".")
    for section in sections:
        here = _submodel(here, section)
    default = here.model_fields[name].default if here else None
    field = field.partition("[")[0]
    if isinstance(default, BaseModel) or _submodel(here, name):
        return f"write it as a table, [{field}]"
    if default is None or default is PydanticUndefined:
        return "leave it out for its default, or see docs/recipes.md"
    return f"write it like {field} = {show(default)}"


def _unknown(model: type[BaseModel], prefix: str, field: str) -> tuple[str, str]:
    """The nearest name of a field or section that does not exist, first in its own section."""
    parent, _, name = field.rpartition(".")
    names = {prefix + path: path.rpartition(".")[2] for path in _paths(model)}
    what = "field" if parent or name in names.values() else "section"
    siblings = {path: last for path, last in names.items() if path.rpartition(".")[0] == parent}
    for candidates in (siblings, names):
        near = nearest(name, candidates.values(), cutoff=0.6 if candidates is siblings else 0.85)
        if near:
            path = next(path for path, last in candidates.items() if last == near)
            return f"{field}: no such {what}", f"did you mean {path}?"
    have = ", ".join(siblings.values())
    return f"{field}: no such {what}", f"{parent or 'a recipe'} has: {have}"


def _paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted field and section, in the order of definition."""
    paths: list[str] = []
    for name in model.model_fields:
        inner = _submodel(model, name)
        paths += [prefix + name, *(_paths(inner, f"{prefix}{name}.") if inner else [])]
    return paths
