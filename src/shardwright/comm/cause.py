"""Why a run failed: one cause per failed rank, and the first of them that is no echo of another."""

from __future__ import annotations

import json
import re
import signal
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum

from shardwright.comm.job import TO_LOWER
from shardwright.errors import ShardwrightError

# The words of gloo, NCCL and the store for "a rank has not come in time".
_TIMEOUT = re.compile(
    r"Timed out waiting|Watchdog caught collective operation timeout|^Wait timeout|wait timeout after"
    r"|timed out after \d+ seconds waiting for clients",
    re.IGNORECASE | re.MULTILINE,
)

# A rank that ends closes its connections, so its peers fail a moment later, and often print first. These are the
# words of gloo, NCCL and the store for "the other end is gone or does not answer".
_ECHO = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|gloo/(transport|rendezvous)|connectFullMesh"
    r"|remote process exited|unhandled system error|NCCL communicator was aborted|failed to recv, got 0 bytes",
    re.IGNORECASE,
)


class Kind(StrEnum):
    """How a rank failed."""

    CONDITION = "condition"  # a ShardwrightError: its text says all
    EXCEPTION = "exception"  # any other exception: a defect, told with its traceback
    SIGNAL = "signal"
    EXIT = "exit"  # it left with an exit code and no exception
    HANG = "hang"  # a collective did not end in time: some rank did not come, and may not know
    ECHO = "echo"  # it lost its connection to another rank, which is where the cause is


_WEAK = {Kind.HANG: 1, Kind.ECHO: 2}  # what another rank may be behind; the greater tells less


@dataclass(frozen=True)
class Cause:
    """Why one rank ended, when (seconds since the epoch), and the text to show for it."""

    rank: int
    kind: Kind
    time: float
    text: str

    @classmethod
    def of_exception(cls, rank: int, error: BaseException) -> Cause:
        """The cause that an exception in `rank` tells."""
        whole = "".join(traceback.format_exception(error)).rstrip()
        if is_hang(error):
            return cls.of_hang(rank, whole)
        if is_echo(error):
            return cls(rank, Kind.ECHO, time.time(), whole)
        if isinstance(error, ShardwrightError):
            return cls(rank, Kind.CONDITION, time.time(), str(error))
        if isinstance(error, SystemExit):
            return cls(rank, Kind.EXIT, time.time(), f"rank {rank} left with exit code {error.code}")
        return cls(rank, Kind.EXCEPTION, time.time(), f"rank {rank} failed:\n{whole}")

    @classmethod
    def of_hang(cls, rank: int, how: str) -> Cause:
        """A collective that did not end in time in `rank`. Who knows where all ranks were puts that in its place."""
        return cls(rank, Kind.HANG, time.time(), f"rank {rank} waited in a collective until its timeout:\n{how}")

    @classmethod
    def of_exit(cls, rank: int, code: int, out_of_memory: bool, to_lower: str = TO_LOWER) -> Cause:
        """The cause of a rank that ended without a word, from its exit code (negative: the signal's number)."""
        if code >= 0:
            return cls(rank, Kind.EXIT, time.time(), f"rank {rank} left with exit code {code}")
        name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
        text = f"rank {rank} was killed by signal {-code} ({name})"
        if out_of_memory:
            text += f"\n  memory ran out and the kernel killed it: lower {to_lower} or shard more"
        elif -code == signal.SIGKILL:
            text += f"\n  if nobody did that, memory ran out (see dmesg): lower {to_lower} or shard more"
        return cls(rank, Kind.SIGNAL, time.time(), text)

    @property
    def may_follow(self) -> bool:
        """Whether it may come from another rank's end, or from a stop that ranks heard at different moments."""
        return self.kind in _WEAK

    def told(self) -> str:
        """What to print: for an echo that is all there is, that no rank told more."""
        if self.kind is Kind.ECHO:
            return f"rank {self.rank} lost another rank, and no rank told why:\n{self.text}"
        return self.text

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Cause:
        fields = json.loads(text)
        return cls(**fields | {"kind": Kind(fields["kind"])})


def is_echo(error: BaseException | None) -> bool:
    """Whether the exception, or one that it came from, is the loss of another rank."""
    return _comes_from(error, _ECHO)


def is_hang(error: BaseException | None) -> bool:
    """Whether the exception, or one that it came from, is a collective's timeout."""
    return _comes_from(error, _TIMEOUT)


def _comes_from(error: BaseException | None, words: re.Pattern[str]) -> bool:
    while error is not None:
        if isinstance(error, RuntimeError) and words.search(str(error)):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def first_cause(causes: Iterable[Cause]) -> Cause | None:
    """The earliest cause that says why; else the earliest hang, else the earliest echo."""
    return min(causes, key=lambda cause: (_WEAK.get(cause.kind, 0), cause.time), default=None)
