"""Which checkpoint a run goes on from: the newest whose every byte is as it was written.

All ranks read: each checks a part of the files, and one reduction says whether all were good. What is damaged is named,
and the checkpoint before it is tried.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from shardwright.checkpoint.folder import CheckpointFolder
from shardwright.checkpoint.load import Checkpoint
from shardwright.comm.collectives import all_gather, broadcast_text
from shardwright.comm.mesh import Mesh
from shardwright.errors import CheckpointError, ShardwrightError


def newest_good(folder: CheckpointFolder, mesh: Mesh, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest good checkpoint of a folder, the same on every rank, or None where nothing was saved.

    `tell` is called with what is wrong with those that are passed over. Raises CheckpointError where all are damaged.
    """
    names = [path.name for path in reversed(folder.written())] if mesh.rank == 0 else []
    names = [name for name in broadcast_text(" ".join(names), mesh.world, mesh.device).split(" ") if name]
    problem = None
    for name in names:
        checkpoint, problem = checked(folder.path / name, mesh)
        if checkpoint is not None:
            return checkpoint
        tell(f"{name} is passed over: {problem}")
    if problem is not None:
        raise CheckpointError(
            f"{folder.path}: none of {len(names)} checkpoints is whole; the oldest: {problem}",
            "put a good copy of one there, or remove them all to start again",
        )
    return None


def checked(path: Path, mesh: Mesh) -> tuple[Checkpoint | None, str]:
    """A checkpoint, if every rank finds its part of it good, or what the first that does not says."""
    checkpoint, problem = None, ""
    try:
        checkpoint = Checkpoint.open(path)
        for file in checkpoint.manifest.files[mesh.rank :: mesh.world.degree]:
            checkpoint.check_file(file)
            checkpoint.tensor_file(file)
        if mesh.rank == 0:
            checkpoint.check_companions()
    except (ShardwrightError, OSError) as error:
        checkpoint, problem = None, error.problem if isinstance(error, ShardwrightError) else str(error)
    first = first_failed(checkpoint is None, mesh)
    if first is None:
        return checkpoint, ""
    return None, broadcast_text(problem, mesh.world, mesh.device, source=first)


def first_failed(failed: bool, mesh: Mesh) -> int | None:
    """The first position in the world of a rank on which something failed, the same on every rank; None: nowhere."""
    found = torch.zeros(mesh.world.degree, dtype=torch.float64, device=mesh.device)
    found[mesh.world.index] = failed
    all_gather(found, mesh.world, reason="checkpoint").wait()
    return int(found.argmax()) if found.any() else None
