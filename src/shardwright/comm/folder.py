"""The temporary folder of a local run: its job, the files in which ranks meet, their causes, a stop request."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from shardwright.comm.cause import Cause
from shardwright.comm.job import Job


class RunFolder:
    """A folder that the launcher makes and removes; ranks get its path.

    A launcher that was killed leaves its folder behind; the next one removes it. The name holds the launcher's
    process id and its id space: containers that share a temporary directory do not share process ids.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, job: Job) -> RunFolder:
        remove_stale()
        folder = cls(Path(tempfile.mkdtemp(prefix=f"shardwright-{_id_space()}-{os.getpid()}-")))
        # Ranks import what the launcher can: its search path, and not the working directory.
        (folder.path / "job.json").write_text(json.dumps({"job": asdict(job), "path": sys.path}))
        return folder

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def job(self) -> tuple[Job, list[str]]:
        """The job, and the launcher's module search path."""
        content = json.loads((self.path / "job.json").read_text())
        return Job(**content["job"] | {"arguments": tuple(content["job"]["arguments"])}), content["path"]

    def store(self, attempt: int) -> Path:
        """The file in which the ranks of an attempt meet. A file used once cannot be met in again."""
        return self.path / f"store-{attempt}"

    def whereabouts(self, attempt: int, rank: int) -> Path:
        """The file in which a rank of an attempt says where it is."""
        return self.path / f"whereabouts-{attempt}-{rank}"

    def write_cause(self, attempt: int, cause: Cause) -> None:
        self._write(f"cause-{attempt}-{cause.rank}.json", cause.to_json())

    def causes(self, attempt: int) -> dict[int, Cause]:
        """What the failed ranks of an attempt told, by rank."""
        told = [Cause.from_json(path.read_text()) for path in self.path.glob(f"cause-{attempt}-*.json")]
        return {cause.rank: cause for cause in told}

    def request_stop(self, number: signal.Signals) -> None:
        """Record who asked the run to stop; the first one counts."""
        if self.stop_requested() is None:
            self._write("stop", str(int(number)))

    def stop_requested(self) -> signal.Signals | None:
        try:
            return signal.Signals(int((self.path / "stop").read_text()))
        except FileNotFoundError:
            return None

    def _write(self, name: str, text: str) -> None:
        """Readers see the whole text or no file."""
        draft = self.path / f".{name}.{os.getpid()}"
        draft.write_text(text)
        draft.replace(self.path / name)


def remove_stale() -> None:
    """Remove the folders that killed launchers of this user left in the temporary directory."""
    for path in Path(tempfile.gettempdir()).glob(f"shardwright-{_id_space()}-*"):
        match = re.fullmatch(r"shardwright-\d+-(\d+)-\w+", path.name)
        if match and not is_running(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def is_running(process: int) -> bool:
    """Whether a process with this id exists, ours or another user's."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _id_space() -> int:
    """The number of this process's pid namespace; 0 where the system has none."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
