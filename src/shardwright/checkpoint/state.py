"""What of a rank's state is saved, and how it comes back: boxes of named tensors, of several kinds.

Every element is written once. Ranks that hold the same share of it, because they see different data, divide it among
themselves as they do when norms are counted; where tensor parallelism or a tied matrix keeps it twice, one counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwright.checkpoint.manifest import WEIGHTS, StoredBox, Training
from shardwright.errors import CheckpointError
from shardwright.layout.box import Box, cut
from shardwright.nn.initial import Values
from shardwright.optim.optimizers import SGD, AdamW
from shardwright.parallel.compose import Runtime
from shardwright.parallel.zero.unit import Unit

STEP = "step"  # of AdamW's state: a number, kept in the manifest

RANDOM_STATES = ("random/cpu", "random/cuda")
"""Keys of a rank's random state in its file; of use to models that draw random numbers, on as many ranks."""


@dataclass(frozen=True)
class StoredRange:
    """Elements of an owned flat tensor that this rank writes: a box of a global tensor, of one kind."""

    kind: str
    box: Box
    values: Tensor

    @property
    def stored(self) -> StoredBox:
        """What the manifest says of it."""
        return StoredBox(kind=self.kind, name=self.box.name, offset=self.box.offset, size=self.box.size)


def written_ranges(runtime: Runtime, optimizer: AdamW | SGD | None) -> Iterator[StoredRange]:
    """What this rank writes, once no update is under way. `optimizer` None: the weights alone."""
    for unit in runtime.states.units:
        begin, end = _own_share(unit)
        pieces = [piece for piece in cut(unit.owned_pieces, begin, end) if piece.counts]
        for kind, flat in _flat_tensors(unit, optimizer):
            for piece in pieces:
                yield StoredRange(kind, piece.box, flat[begin + piece.start : begin + piece.stop])


def _own_share(unit: Unit) -> tuple[int, int]:
    """The part of the owned range that falls to this rank among those that have the same."""
    copies = unit.data.copies
    length = (unit.end - unit.begin) // copies.degree
    return copies.index * length, (copies.index + 1) * length


def _flat_tensors(unit: Unit, optimizer: AdamW | SGD | None) -> Iterator[tuple[str, Tensor]]:
    yield WEIGHTS, unit.updated_values()
    if optimizer is not None:
        state = optimizer.state(unit.name)
        yield from ((kind, state[kind]) for kind in optimizer.names)


def num_updates(runtime: Runtime, optimizer: AdamW | SGD) -> int:
    """How many steps were applied; every unit of every rank has had as many."""
    counts = {int(optimizer.state(unit.name).get(STEP, torch.zeros(()))) for unit in runtime.states.units}
    assert len(counts) <= 1, f"units were updated unequally often: {counts}"
    return counts.pop() if counts else 0


def restore_moments(runtime: Runtime, optimizer: AdamW | SGD, kinds: dict[str, Values], training: Training) -> None:
    """Give the optimizer's state of all that this rank owns its saved values; `kinds` has a source for each moment."""
    for unit in runtime.states.units:
        state = optimizer.state(unit.name)
        for kind in optimizer.names:
            for piece in unit.owned_pieces:
                kinds[kind].read(piece.box, state[kind][piece.start : piece.stop])
        if STEP in state:
            state[STEP].fill_(training.updates)


def random_states(device: torch.device) -> list[tuple[str, Tensor]]:
    """This rank's random state, by key: bytes."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return list(zip(RANDOM_STATES, states, strict=False))


def set_random_states(states: Sequence[tuple[str, Tensor]], device: torch.device) -> None:
    """Go on from a random state that was saved. Raises CheckpointError for what is none."""
    try:
        for key, state in states:
            if key == RANDOM_STATES[0]:
                torch.set_rng_state(state.clone())
            elif device.type == "cuda":
                torch.cuda.set_rng_state(state.clone(), device)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"the random state that was saved is none: {error}", "use another checkpoint") from None
