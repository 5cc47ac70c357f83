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
        layer.forward = _full(layer) if setting == "full" else _selective(layer)


def _full(layer: nn.Module) -> Callable[..., Any]:
    forward, draws = layer.forward, getattr(layer, "draws_random", True)

    def run(*inputs: Tensor) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=draws)

    return run


def _selective(layer: nn.Module) -> Callable[..., Any]:
    forward, scopes = layer.forward, _Scopes()
    for module in layer.modules():
        if getattr(module, "recomputable", False) or isinstance(module, _CHEAP):
            module.register_forward_pre_hook(scopes.call)
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
        self._saved = 0
        self._value: Tensor | None = None

    def save(self) -> None:
        """Autograd will ask for it once more."""
        self._saved += 1

    def make(self) -> Tensor:
        """The tensor, computed anew."""
        name = type(self._module).__name__
        inputs = [x.take(f"the input of {name}") if isinstance(x, _Kept | _View) else x for x in self._inputs]
        with torch.no_grad():
            return self._module.forward(*inputs)

    def take(self) -> Tensor:
        """The tensor, for one that saved it."""
        value = self.make() if self._value is None else self._value
        self._saved -= 1
        self._value = value if self._saved else None
        return value


class _Kept:
    """A tensor as it is, kept with what says whether it was changed in place since."""

    def __init__(self, tensor: Tensor) -> None:
        # Detached: an output that its own node kept would keep itself alive.
        self._tensor, self._version = tensor.detach(), tensor._version

    def take(self, what: str = "what a backward needs") -> Tensor:
        """The tensor. Raises RuntimeError where it was changed."""
        if self._tensor._version != self._version:
            raise RuntimeError(
                f"memory.recompute: {what} was changed in place after the forward had read it, so that the backward "
                "would compute something else; do not change it in place, or use memory.recompute = none to see where"
            )
        return self._tensor


class _View:
    """A view of a derived tensor: saved by autograd, or the input of another derived tensor."""

    def __init__(self, derived: _Derived, like: Tensor) -> None:
        self._derived, self._size, self._stride = derived, like.size(), like.stride()
        self._offset = like.storage_offset()

    def saved(self) -> _View:
        """The same, and autograd will ask for it."""
        self._derived.save()
        return self

    def take(self, what: str = "") -> Tensor:
        """The view, of what is computed anew for another derived tensor, or shared by those that saved it."""
        base = self._derived.make() if what else self._derived.take()
        return base.as_strided(self._size, self._stride, self._offset)


class _Scope:
    """One forward of a layer: which memory holds derived tensors, as it was when they were made."""

    def __init__(self) -> None:
        self._derived: dict[int, tuple[weakref.ref[UntypedStorage], int, _Derived]] = {}
        self._called: list[list[Any]] = []

    def _find(self, tensor: Tensor) -> _View | None:
        """The tensor as a view of a derived one, unless that was changed since it was made."""
        storage = tensor.untyped_storage()
        reference, version, derived = self._derived.get(id(storage), (None, -1, None))
        if derived is None or reference is None or reference() is not storage or tensor._version != version:
            return None
        return _View(derived, tensor)

    def call(self, inputs: Sequence[Any]) -> None:
        """A cheap module is called: what its inputs are before it may change them."""
        self._called.append([(self._find(x) or _Kept(x)) if isinstance(x, Tensor) else x for x in inputs])

    def close(self) -> None:
        """The forward has ended. torch holds the scope for as long as a tensor that was saved in it, and what made the
        others would stay as long."""
        self._derived.clear()

    def derive(self, module: nn.Module, inputs: Sequence[Any], output: Any) -> None:
        """The module has returned. What it changed in place is of use where that was derived."""
        kept = self._called.pop()
        if not isinstance(output, Tensor):
            return
        storage = output.untyped_storage()
        for x, own in zip(inputs, kept, strict=True):
            if isinstance(x, Tensor) and x.untyped_storage() is storage and isinstance(own, _Kept):
                return
        if output.storage_offset() == 0 and output.is_contiguous():
            self._derived[id(storage)] = weakref.ref(storage), output._version, _Derived(module, kept)

    def pack(self, tensor: Tensor) -> _Kept | _View:
        """What autograd keeps of a tensor that it saves."""
        view = self._find(tensor)
        return _Kept(tensor) if view is None else view.saved()


def _unpack(kept: _Kept | _View) -> Tensor:
    return kept.take()


class _Scopes:
    """The scope of a layer's forward while that is under way."""

    def __init__(self) -> None:
        self._scope: _Scope | None = None

    @contextmanager
    def open(self) -> Iterator[_Scope]:
        """A scope for one forward."""
        scope = self._scope = _Scope()
        try:
            yield scope
        finally:
            self._scope = None
            scope.close()

    def call(self, module: nn.Module, inputs: Any) -> None:
        """A hook before a cheap module."""
        if self._scope is not None:
            self._scope.call(inputs)

    def note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """A hook after it."""
        if self._scope is not None:
            self._scope.derive(module, inputs, output)
