"""Where owned state lives, and how it is updated there: on the device, or (beside this file) on the host.

Note: offload is only where owned state lives. Masters and the optimizer's moments have a home. A home says where they
are allocated, takes owned gradients as they become complete, and updates the units' owned values. Nothing else knows
which home it is: a unit is told of a handle after which its owned values are new (`arrives`), and waits for it before
they are read or its gradient is written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from shardwright.comm.collectives import DONE, Handle
from shardwright.optim.owned import Optimizer, OwnedTensor


class Share(Protocol):
    """What a home sees of a unit: what this rank owns of it."""

    name: str
    masters: Tensor
    owned_values: Tensor
    owned_gradient: Tensor

    def owned_tensor(self, *, settled: bool = True) -> OwnedTensor:
        """The masters with their gradient. `settled`: wait for updates under way."""
        ...

    def finish_sum(self) -> None:
        """Let the current stream wait until the gradient is complete."""
        ...

    def arrives(self, arrival: Handle) -> None:
        """The owned values are new once the handle has been waited for."""
        ...

    def publish(self) -> None:
        """Begin to gather the owned values where parameters rest whole."""
        ...


class Home(Protocol):
    """Where masters and moments live; also the `Place` of an optimizer's state."""

    category: str
    """The ledger's name for the memory of masters and moments."""

    def masters(self, values: Tensor) -> Tensor:
        """Masters for owned values: the values themselves where none are kept apart."""
        ...

    def zeros(self, like: Tensor) -> Tensor:
        """See `Place`."""
        ...

    def settle(self) -> None:
        """See `Place`."""
        ...

    def prepare(self, shares: Sequence[Share]) -> None:
        """Allocate, once, what updates of these need."""
        ...

    def begin_step(self) -> None:
        """Gradients will be complete anew."""
        ...

    def take(self, share: Share) -> None:
        """A unit's owned gradient has been summed over its owners, and its sum over the copies has begun. Called at
        least once a step for each unit."""
        ...

    def update(self, shares: Sequence[Share], optimizer: Optimizer, lr: float, gradient_scale: float) -> None:
        """Update the owned values of units, in this order, from their complete gradients."""
        ...

    def held_for(self, name: str) -> dict[str, list[Tensor]]:
        """What is held for one unit beside masters and moments, by the ledger's categories."""
        ...

    def buffers(self) -> list[Tensor]:
        """What is held on the device for all units together."""
        ...


def separate(values: Tensor) -> bool:
    """Whether masters are more exact than the values that compute: fp32 beside bf16."""
    return master_dtype(values.dtype) != values.dtype


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 in fp64 runs."""
    return torch.promote_types(dtype, torch.float32)


class OnDevice:
    """memory.offload = "none": state lives where its gradients are. Each unit is published as soon as it is updated, so
    that the transfer of one runs under the update of the next and, for the last ones, under the next forward."""

    category = "optimizer"

    def masters(self, values: Tensor) -> Tensor:
        """See `Home`."""
        return torch.zeros_like(values, dtype=master_dtype(values.dtype)) if separate(values) else values

    def zeros(self, like: Tensor) -> Tensor:
        """See `Place`."""
        return torch.zeros_like(like)

    def settle(self) -> None:
        """See `Place`: reading waits for the device as any reading does."""

    def prepare(self, shares: Sequence[Share]) -> None:
        """See `Home`."""

    def begin_step(self) -> None:
        """See `Home`."""

    def take(self, share: Share) -> None:
        """See `Home`: gradients are where they are needed."""

    def update(self, shares: Sequence[Share], optimizer: Optimizer, lr: float, gradient_scale: float) -> None:
        """See `Home`."""
        for share in shares:
            apart = share.masters is not share.owned_values
            optimizer.update(share.owned_tensor(), lr, gradient_scale, share.owned_values if apart else None)
            share.arrives(DONE)
            share.publish()

    def held_for(self, name: str) -> dict[str, list[Tensor]]:
        """See `Home`."""
        return {}

    def buffers(self) -> list[Tensor]:
        """See `Home`."""
        return []
