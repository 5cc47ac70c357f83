"""What the launcher starts for each rank: `python -m shardwright.comm.rank FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

from shardwright.comm.cause import Cause
from shardwright.comm.folder import RunFolder
from shardwright.comm.job import Place, Source
from shardwright.comm.stop import StopRequest, follow_parent, leave_now, listening
from shardwright.comm.whereabouts import shared_page


def main() -> None:
    """Run the job of the folder as the rank that the agent's environment names; leave with 0 or 1."""
    folder = RunFolder(Path(sys.argv[1]))
    follow_parent(int(folder.path.name.split("-")[2]))
    place = Place(
        rank=int(os.environ["RANK"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        source=Source.LOCAL,
        attempt=int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
    )
    stop = StopRequest()

    def take(number: signal.Signals) -> None:
        if stop.requested:
            leave_now(128 + number)
        # The launcher asks with SIGTERM, whatever asked the launcher; its folder tells.
        folder.request_stop(number)
        stop.request(folder.stop_requested() or number)

    with listening(take):
        try:
            _serve(folder, place, stop)
        except BaseException as error:
            if not (isinstance(error, SystemExit) and not error.code):
                _fail(folder, place, Cause.of_exception(place.rank, error))


def _serve(folder: RunFolder, place: Place, stop: StopRequest) -> None:
    job, sys.path[:] = folder.job()
    # torch takes seconds to import; a signal or the launcher's end in that time must find us listening.
    from shardwright.comm.store import local_store
    from shardwright.comm.worker import serve

    page = shared_page(folder.whereabouts(place.attempt, place.rank))
    fail = partial(_fail, folder, place)
    serve(job, place, stop, lambda: local_store(folder.store(place.attempt), place), page, fail)


def _fail(folder: RunFolder, place: Place, cause: Cause) -> NoReturn:
    """Tell the cause, then leave: unwinding the process groups could wait for ranks that will not answer."""
    folder.write_cause(place.attempt, cause)
    leave_now(1)


if __name__ == "__main__":
    main()
