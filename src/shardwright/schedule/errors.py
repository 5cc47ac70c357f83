"""The error of a pipeline schedule that cannot be built, or that would not run."""

from __future__ import annotations

from shardwright.errors import ShardwrightError


class ScheduleError(ShardwrightError):
    """A pipeline schedule that does not exist, is not complete, or would wait for ever."""
