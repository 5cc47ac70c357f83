"""Live tensors of a step, counted while it runs.

Note: what is seen. On CPUs a dispatch mode sees every operation that torch performs, in the backward too, and with it
every memory that a tensor gets; it is told by a weak reference when the memory goes. What an operation needs inside
itself, and what the C library keeps back, is not in it: these are live bytes, not resident ones. On CUDA the caching
allocator counts the same, with what operations need inside themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside it, and remembers the most there were.

    `before` are storages from before, which do not count; but what an empty one of them gets inside is a transfer's. So
    is memory told to `note_transfer`; everything else is activations.
    """

    def __init__(self, before: Sequence[UntypedStorage] = ()) -> None:
        super().__init__()
        self._before = list(before)
        self._known = {id(storage): (weakref.ref(storage), 0) for storage in self._before}
        self._resized = [storage for storage in self._before if storage.nbytes() == 0]
        self._transfers: set[int] = set()
        self.activations = self.transfers = 0
        self.peak = self.peak_activations = self._peak_before = 0
        self.observer: Callable[[Any, LiveTensors], None] | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler at the first operation, seconds for every rank, to keep it away from here.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Perform the operation and count what it made."""
        returned = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(returned):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        self._look()
        if self.observer is not None:
            self.observer(func, self)
        return returned

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._known.get(key)
        if known is not None and known[0]() is storage:
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._gone(key, size)), size
        self.activations += size

    def _gone(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        if key in self._transfers:
            self._transfers.remove(key)
            self.transfers -= size
        else:
            self.activations -= size

    def note_transfer(self, tensor: Tensor) -> None:
        """The tensor, which was made just now, is a transfer's buffer."""
        key = id(tensor.untyped_storage())
        if key in self._known and key not in self._transfers:
            self._transfers.add(key)
            size = self._known[key][1]
            self.activations -= size
            self.transfers += size
            # The operation that made it had just counted it as an activation.
            self.peak_activations = max(self._peak_before, self.activations)

    def _look(self) -> None:
        resized = sum(storage.nbytes() for storage in self._resized)
        self._peak_before = self.peak_activations
        self.peak_activations = max(self.peak_activations, self.activations)
        self.peak = max(self.peak, self.activations + self.transfers + resized)
