"""One step of a run watched by its time: what each rank does when."""

from __future__ import annotations

from shardwright.comm.collectives import barrier
from shardwright.comm.mesh import Mesh
from shardwright.comm.recorder import Recorder
from shardwright.record.timeline import TimelineRecord


class StepTimeline:
    """Records the step that runs inside it: `record` is there afterwards. All ranks of the mesh enter together."""

    def __init__(self, mesh: Mesh, step: int) -> None:
        self._mesh, self._step = mesh, step
        self.record: TimelineRecord | None = None

    def __enter__(self) -> StepTimeline:
        barrier(self._mesh.world)
        self._recorder = self._mesh.whereabouts.listener = Recorder(self._mesh.device)
        self._recorder.begin(self._mesh.whereabouts.doing)
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        self._mesh.whereabouts.listener = None
        if error is None:
            self.record = self._recorder.record(self._mesh.rank, self._step)
