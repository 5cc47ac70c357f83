"""Recomputation: what a layer keeps from its forward for its backward, and what it computes again.

Note: two settings. Under "full" a layer keeps its input, and the backward runs its forward once more, up to the last
tensor that it needs (Chen et al. 2016; torch's own `checkpoint` does it). Under "selective" a layer keeps what its
matrix products and its attention gave, and computes again what lies between: norms, activations, and the copy of the
attended heads. They cost a pass over memory and no product. The products' gathered inputs are gathered again.
(Megatron's selective recomputation is another: of the core of attention, which flash attention never keeps.)

Note: a derived tensor. Modules say of themselves that they are cheap (`recomputable`). What autograd saves of such a
module's output is not the tensor, but how it was made. The module's inputs are kept by whoever made them. A saved
tensor is asked for once; two of one derived tensor share one computation.

Note: under ZeRO-3 and in I. Recomputation begins when a layer's backward asks for its first saved tensor: after the
hook on the layer's output, which makes its parameters whole. The products that I leaves to W hold what was computed
again until W: from I to W a layer keeps what it would keep without recomputation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

_CHEAP = (nn.LayerNorm, nn.RMSNorm, nn.GELU, nn.SiLU, nn.ReLU)
"""torch's own modules that selective recomputation computes again in a model of one's own."""


def recompute(layers: Sequence[nn.Module], setting: str, chosen: Sequence[int] | str) -> None:
    """Let these of a model's layers compute again in the backward what `setting` says: selective or full.

    `chosen` are indices of layers, or "all". To be called after modules were replaced.
    """
    for index in range(len(layers)) if isinstance(chosen, str) else chosen:
        layer = layers[index]
        # The layer's own hooks, which say when its parameters are needed, must not run again: only its forward does.
        layer.forward = _full(layer.forward) if setting == "full" else _selective(layer)


def _full(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Tensor) -> Any:
        # No layer draws random numbers, so that there is no state of a generator to bring back.
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)

    return run


def _selective(layer: nn.Module) -> Callable[..., Any]:
    forward, scopes = layer.forward, _Scopes()
    for module in layer.modules():
        if getattr(module, "recomputable", False) or isinstance(module, _CHEAP):
            module.register_forward_hook(scopes.note)
        if hasattr(module, "regathers"):
            module.regathers = True  # type: ignore[assignment]

    def run(*inputs: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        with scopes.open() as scope, saved_tensors_hooks(scope.pack, _unpack):
            return forward(*inputs)

    return run


class _Derived:
    """A tensor that can be made again from others: `module(*inputs)`."""

    def __init__(self, module: nn.Module, inputs: Sequence[Any]) -> None:
        self._module, self._inputs = module, inputs
        self._versions = [x._version if isinstance(x, Tensor) else None for x in inputs]
        self._saved = 0
        self._value: Tensor | None = None

    def save(self) -> None:
        """Autograd will ask for it once more."""
        self._saved += 1

    def make(self) -> Tensor:
        """The tensor, computed anew."""
        for x, version in zip(self._inputs, self._versions, strict=True):
            if isinstance(x, Tensor) and x._version != version:
                raise RuntimeError(
                    f"{type(self._module).__name__}: its input was changed in place before the backward, so that its "
                    "output cannot be computed again; use memory.recompute = full or none"
                )
        inputs = [x.make() if isinstance(x, _Derived) else x for x in self._inputs]
        with torch.no_grad():
            return self._module.forward(*inputs)

    def take(self) -> Tensor:
        """The tensor, for one that saved it."""
        value = self.make() if self._value is None else self._value
        self._saved -= 1
        self._value = value if self._saved else None
        return value


class _View:
    """A saved view of a derived tensor."""

    def __init__(self, derived: _Derived, like: Tensor) -> None:
        self._derived, self._size, self._stride = derived, like.size(), like.stride()
        self._offset = like.storage_offset()
        derived.save()

    def take(self) -> Tensor:
        return self._derived.take().as_strided(self._size, self._stride, self._offset)


class _Scope:
    """One forward of a layer: which memory holds derived tensors."""

    def __init__(self) -> None:
        self._derived: dict[int, tuple[weakref.ref[UntypedStorage], _Derived]] = {}

    def _find(self, tensor: Tensor) -> _Derived | None:
        storage = tensor.untyped_storage()
        reference, derived = self._derived.get(id(storage), (None, None))
        return derived if reference is not None and reference() is storage else None

    def derive(self, module: nn.Module, inputs: Sequence[Any], output: Tensor) -> None:
        """Note that a module made a tensor; or changed one in place, which is of use where that was derived."""
        storage = output.untyped_storage()
        found = [self._find(x) if isinstance(x, Tensor) else None for x in inputs]
        for x, derived in zip(inputs, found, strict=True):
            if isinstance(x, Tensor) and x.untyped_storage() is storage and derived is None:
                return
        # Detached: what is kept for the layer's graph must not hold the graph.
        own = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
        kept = [derived or x for x, derived in zip(own, found, strict=True)]
        self._derived[id(storage)] = weakref.ref(storage), _Derived(module, kept)

    def pack(self, tensor: Tensor) -> Tensor | _View:
        """What autograd keeps of a tensor that it saves."""
        derived = self._find(tensor)
        # Detached: an output that its own node kept would keep itself alive.
        return tensor.detach() if derived is None else _View(derived, tensor)


def _unpack(kept: Tensor | _View) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.take()


class _Scopes:
    """The scope of a layer's forward while that is under way."""

    def __init__(self) -> None:
        self._scope: _Scope | None = None

    @contextmanager
    def open(self) -> Iterator[_Scope]:
        """A scope for one forward."""
        self._scope = _Scope()
        try:
            yield self._scope
        finally:
            self._scope = None

    def note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """A hook on a cheap module."""
        if self._scope is not None and isinstance(output, Tensor):
            self._scope.derive(module, inputs, output)
