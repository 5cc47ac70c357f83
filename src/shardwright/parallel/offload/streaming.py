"""memory.offload = "state": masters and moments live on the host and stream through the device to be updated there.

Note: double buffering. An owned range is cut into windows, and two slots on the device hold one window's state each.
While one window is updated, the next is on its way in and the one before on its way out, in three lanes. A slot is
loaded again when its last window has been stored. The kernel, and how a window's elements are grouped in it, are those
of an update without offload: the results are the same to the bit.

In fp32 and fp64 compute the parameters are their own masters and stay; the moments alone stream. Lanes run beside the
next forward: a unit that is needed waits for its own last window, not for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import torch
from torch import Tensor

from shardwright.layout.chunk import Window, slot_elements
from shardwright.optim.optimizers import apply_window
from shardwright.optim.owned import Optimizer, Rule
from shardwright.parallel.offload.home import Share, master_dtype, separate
from shardwright.parallel.offload.lane import Lane, Mark, here
from shardwright.parallel.offload.memory import HostMemory

_SLOTS = 2


class _Slot:
    """Room for one window: a row for each tensor of its state, and one for its gradient in the masters' dtype."""

    def __init__(self, rows: int, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self.memory = torch.zeros(rows, elements, dtype=dtype, device=device)
        self.free = here(device)


class Streaming:
    """State on the host, updated on the device. `chunk` is the most bytes of a slot."""

    category = "host"

    def __init__(self, device: torch.device, chunk: int, num_moments: int) -> None:
        self._device, self._chunk, self._num_moments = device, chunk, num_moments
        self._host = HostMemory(device)
        self._load, self._compute, self._store = Lane(device), Lane(device), Lane(device)
        self._slots: list[_Slot] = []
        self._elements = 0

    def masters(self, values: Tensor) -> Tensor:
        """See `Home`."""
        return self._host.zeros(values.numel(), master_dtype(values.dtype)) if separate(values) else values

    def zeros(self, like: Tensor) -> Tensor:
        """See `Place`."""
        return self._host.zeros(like.numel(), like.dtype)

    def settle(self) -> None:
        """See `Place`."""
        self._store.mark().finish()

    def prepare(self, shares: Sequence[Share]) -> None:
        """Make the slots, no larger than the longest owned range needs."""
        values, dtype = shares[0].owned_values, shares[0].masters.dtype
        casts = shares[0].owned_gradient.dtype != dtype
        rows = separate(values) + self._num_moments + casts
        longest = max(share.masters.numel() for share in shares)
        self._elements = slot_elements(self._chunk, rows * dtype.itemsize, longest)
        self._slots = [_Slot(rows, self._elements, dtype, self._device) for _ in range(_SLOTS)]

    def begin_step(self) -> None:
        """See `Home`."""

    def take(self, share: Share) -> None:
        """See `Home`: gradients stay on the device."""

    def update(self, shares: Sequence[Share], optimizer: Optimizer, lr: float, gradient_scale: float) -> None:
        """See `Home`; on CUDA it returns when everything has been started."""
        with self._load.running(after=self._store.mark()):
            pass  # what the last update stored is loaded again
        started, slots = here(self._device), cycle(self._slots)
        for share in shares:
            rule = optimizer.begin(share.name, lr, gradient_scale)
            for window in share.owned_tensor(settled=False).windows(self._elements):
                self._update(share, optimizer, rule, window, next(slots), started)
            with self._compute.running(after=started):
                share.arrives(self._compute.mark())
                share.publish()

    def _update(
        self, share: Share, optimizer: Optimizer, rule: Rule, window: Window, slot: _Slot, started: Mark
    ) -> None:
        """Stream one window through a slot."""
        inside, length = slice(window.begin, window.end), window.end - window.begin
        apart = share.masters is not share.owned_values
        on_host = [t[inside] for t in ([share.masters] if apart else []) + optimizer.moments(share.name)]
        rows = [row[:length] for row in slot.memory]
        with self._load.running(after=slot.free):
            for row, host in zip(rows, on_host, strict=False):  # the last row may be the gradient's
                row.copy_(host, non_blocking=True)
        with self._compute.running(after=self._load.mark()):
            started.wait()
            new = share.owned_values[inside]
            values, moments = (rows[0] if apart else new), rows[apart : len(on_host)]
            gradient = share.owned_gradient[inside]
            gradient = rule.ready(gradient, rows[-1] if gradient.dtype != values.dtype else gradient)
            apply_window(optimizer, values, gradient, moments, rule, window)
            if apart:
                new.copy_(values)
        with self._store.running(after=self._compute.mark()):
            for row, host in zip(rows, on_host, strict=False):
                host.copy_(row, non_blocking=True)
        slot.free = self._store.mark()

    def held_for(self, name: str) -> dict[str, list[Tensor]]:
        """See `Home`."""
        return {}

    def buffers(self) -> list[Tensor]:
        """See `Home`: the slots."""
        return [slot.memory for slot in self._slots]
