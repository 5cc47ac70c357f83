"""memory.offload = "update": state lives on the host and is updated there (ZeRO-Offload, Ren et al. 2021).

Note: three journeys. A unit's owned gradient leaves for the host as soon as it is complete, under the backward of the
units before it. When the step has been found healthy, one worker updates unit after unit with torch's fused CPU kernel,
and sends each window's new values back as soon as it has them, under the update of the next and under the next forward.
A unit that is needed waits for its own update. The worker starts no collective: what has to be gathered is gathered by
the main thread when it is first needed, in the order of the units, which is the same on all ranks.

The memory in which a gradient landed carries the new parameters back: the update has used the gradient up, and compute
is no wider than gradients are.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from shardwright.optim.optimizers import apply_window
from shardwright.optim.owned import Optimizer, Rule
from shardwright.parallel.offload.home import Share, master_dtype
from shardwright.parallel.offload.lane import Lane, Mark, enter_thread, here
from shardwright.parallel.offload.memory import HostMemory

_WINDOW = 1 << 20  # elements: a window's gradient in the masters' dtype stays in the caches


class _Arrival:
    """New values on their way: the worker has first to send them."""

    def __init__(self, sent: Future[Mark]) -> None:
        self._sent = sent

    def wait(self) -> None:
        """See `Handle`. Raises what the worker raised."""
        self._sent.result().wait()

    def finish(self) -> None:
        """Let the host wait until they are there."""
        self._sent.result().finish()


class OnHost:
    """State on the host, updated on the host."""

    category = "host"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = HostMemory(device)
        self._leave, self._return = Lane(device), Lane(device)
        self._worker = ThreadPoolExecutor(1, "offload", initializer=enter_thread, initargs=(device,))
        self._landings: dict[str, Tensor] = {}
        self._landed: dict[str, Mark] = {}
        self._arrivals: list[_Arrival] = []

    def masters(self, values: Tensor) -> Tensor:
        """See `Home`: always apart, for the host needs its own."""
        return self._host.zeros(values.numel(), master_dtype(values.dtype))

    def zeros(self, like: Tensor) -> Tensor:
        """See `Place`."""
        return self._host.zeros(like.numel(), like.dtype)

    def settle(self) -> None:
        """See `Place`. Raises what the worker raised."""
        for arrival in self._arrivals:
            arrival.finish()
        self._arrivals = []

    def prepare(self, shares: Sequence[Share]) -> None:
        """Make the areas where gradients land."""
        for share in shares:
            gradient = share.owned_gradient
            self._landings[share.name] = self._host.zeros(gradient.numel(), gradient.dtype)

    def begin_step(self) -> None:
        """See `Home`."""
        self._landed = {}

    def take(self, share: Share) -> None:
        """See `Home`: the gradient leaves, once a step."""
        if share.name in self._landed:
            return
        share.finish_sum()
        with self._leave.running(after=here(self._device)):
            self._landings[share.name].copy_(share.owned_gradient, non_blocking=True)
        self._landed[share.name] = self._leave.mark()

    def update(self, shares: Sequence[Share], optimizer: Optimizer, lr: float, gradient_scale: float) -> None:
        """See `Home`; it returns when the worker has been told."""
        self.settle()  # nothing is under way, unless a unit was not used since the last update
        started = here(self._device)
        for share in shares:
            rule = optimizer.begin(share.name, lr, gradient_scale)
            landed = self._landed[share.name]
            arrival = _Arrival(self._worker.submit(self._update, share, optimizer, rule, landed, started))
            self._arrivals.append(arrival)
            share.arrives(arrival)

    @torch.no_grad()
    def _update(self, share: Share, optimizer: Optimizer, rule: Rule, landed: Mark, started: Mark) -> Mark:
        """In the worker: update one unit, and send its values back as they are made."""
        masters, landing, values = share.masters, self._landings[share.name], share.owned_values
        moments = optimizer.moments(share.name)
        landed.finish()
        for window in share.owned_tensor(settled=False).windows(_WINDOW):
            inside = slice(window.begin, window.end)
            new, gradient = masters[inside], landing[inside]
            ready = rule.ready(gradient, torch.empty_like(new) if gradient.dtype != new.dtype else gradient)
            apply_window(optimizer, new, ready, [m[inside] for m in moments], rule, window)
            if values.dtype != new.dtype:
                new = gradient.view(values.dtype)[: window.end - window.begin].copy_(new)
            with self._return.running(after=started):
                values[inside].copy_(new, non_blocking=True)
        return self._return.mark()

    def held_for(self, name: str) -> dict[str, list[Tensor]]:
        """See `Home`: the landing areas."""
        return {"host": [self._landings[name]]}

    def buffers(self) -> list[Tensor]:
        """See `Home`."""
        return []
