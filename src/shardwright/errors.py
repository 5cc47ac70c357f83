"""Errors that a user can act on: what is wrong, the numbers, the nearest way out.

Every error that Shardwright raises on purpose is a `ShardwrightError`. The command line prints its text alone;
any other exception is a defect and keeps its traceback.
"""

from __future__ import annotations


class ShardwrightError(Exception):
    """A condition that the user can mend, in one line, with the way out on the next.

    `problem` names the field or the thing and gives the numbers; `way_out` says what works instead.
    """

    def __init__(self, problem: str, way_out: str | None = None) -> None:
        self.problem = problem
        self.way_out = way_out
        super().__init__(problem, way_out)

    def __str__(self) -> str:
        return self.problem if self.way_out is None else f"{self.problem}\n  {self.way_out}"


class RecipeError(ShardwrightError):
    """A recipe or an override that cannot be read, or that asks for the impossible."""


class LayoutError(ShardwrightError):
    """A layout that this model, this batch or this world cannot be laid out in."""


class DataError(ShardwrightError):
    """A corpus, a tokenizer or a prepared dataset that cannot be used."""


class CheckpointError(ShardwrightError):
    """A checkpoint or a model directory that cannot be read or written."""


class RunError(ShardwrightError):
    """A run that cannot start or go on: its directory, its ranks, its numbers."""
