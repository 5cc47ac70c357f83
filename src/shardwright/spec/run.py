"""`[run]`: where the ranks run, how long they wait for one another, and who else is told of the run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from shardwright.spec.section import Count, FieldProblem, SecondsText, Section
from shardwright.units import Seconds, parse_seconds

Tracker = Literal["tensorboard", "wandb"]


def _each_once(trackers: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
    twice = next((name for name in trackers if trackers.count(name) > 1), None)
    if twice is not None:
        raise FieldProblem(f'"{twice}" is named {trackers.count(twice)} times', "name each tracker once")
    return trackers


class RunSpec(Section):
    """The processes of a run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is a GPU
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # auto: nccl on GPUs, one for each rank, gloo on CPUs
    compile: bool = False  # what lies between matrix products; on CPUs this needs a C++ compiler
    max_restarts: Count = 0
    collective_timeout: SecondsText = "10 min"
    grace_period: SecondsText = "30 s"  # between asking a rank to end and ending it
    trackers: Annotated[tuple[Tracker, ...], AfterValidator(_each_once)] = ()

    @property
    def collective_timeout_seconds(self) -> Seconds:
        """How long a rank waits for the others in one collective."""
        return parse_seconds(self.collective_timeout, "run.collective_timeout")

    @property
    def grace_period_seconds(self) -> Seconds:
        """How long a rank may take to end after it was asked to."""
        return parse_seconds(self.grace_period, "run.grace_period")
