"""What every section of a recipe shares: frozen, strict about types, closed to unknown fields."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from shardwright.errors import RecipeError
from shardwright.units import parse_bytes, parse_seconds


class FieldProblem(ValueError):
    """What is wrong with a field's value, without the field's name, and the way out."""

    def __init__(self, problem: str, way_out: str) -> None:
        self.problem = problem
        self.way_out = way_out
        super().__init__(problem, way_out)


class Section(BaseModel):
    """A frozen table of a recipe. Nothing is coerced: "50" is not a number and 1 is not true."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, data: Any) -> Any:
        """TOML and JSON have lists; frozen fields hold tuples."""
        if not isinstance(data, dict):
            return data
        return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


def _number_as_text(value: Any) -> Any:
    """A bare number is a quantity in the smallest unit: 30 reads as "30"."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _bytes_text(value: str) -> str:
    try:
        parse_bytes(value)
    except RecipeError as error:
        raise FieldProblem(error.problem.partition(": ")[2], error.way_out or "") from None
    return value


def _optional_bytes_text(value: str) -> str:
    return value and _bytes_text(value)


def _seconds_text(value: str) -> str:
    try:
        parse_seconds(value)
    except RecipeError as error:
        raise FieldProblem(error.problem.partition(": ")[2], error.way_out or "") from None
    return value


Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
AboveZero = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
BytesText = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_bytes_text)]
OptionalBytesText = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_optional_bytes_text)]
SecondsText = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_seconds_text)]
