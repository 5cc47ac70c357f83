"""AdamW and SGD over owned tensors, computed by torch's own fused kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from shardwright.layout.chunk import CACHED_ELEMENTS, UPDATE_ELEMENTS, Window
from shardwright.optim.owned import Optimizer, OwnedTensor, Place, Rule
from shardwright.spec.train import TrainSpec


def apply_window(
    optimizer: Optimizer, values: Tensor, gradient: Tensor, moments: Sequence[Tensor], rule: Rule, window: Window
) -> None:
    """Update a window; the tensors are those of the window, flat, the gradient ready."""
    for run in window.runs:
        part = slice(run.begin - window.begin, run.end - window.begin)
        optimizer.apply(values[part], gradient[part], [m[part] for m in moments], rule, decays=run.decays)


@dataclass
class _Keeping:
    """State by name: `names` of flat tensors like the values."""

    names: ClassVar[tuple[str, ...]] = ()
    _state: dict[str, dict[str, Tensor]] = field(default_factory=dict, kw_only=True)
    _places: dict[str, Place] = field(default_factory=dict, kw_only=True)

    def state(self, name: str) -> dict[str, Tensor]:
        """See `Optimizer`."""
        self._places[name].settle()
        return self._state[name]

    def moments(self, name: str) -> list[Tensor]:
        """See `Optimizer`."""
        return [self._state[name][key] for key in self.names]

    def prepare(self, owned: OwnedTensor) -> None:
        """Make the state of an owned tensor: zeros, where the tensor's place says."""
        self._places[owned.name] = owned.place
        self._state[owned.name] = {key: owned.place.zeros(owned.values) for key in self.names}

    def begin(self, name: str, lr: float, gradient_scale: float) -> Rule:
        """See `Optimizer`."""
        return Rule(0, lr, gradient_scale)

    def apply(self, values: Tensor, gradient: Tensor, moments: Sequence[Tensor], rule: Rule, *, decays: bool) -> None:
        """See `Optimizer`."""
        raise NotImplementedError

    def update(self, owned: OwnedTensor, lr: float, gradient_scale: float, narrow_values: Tensor | None = None) -> None:
        """See `Optimizer`."""
        rule, moments = self.begin(owned.name, lr, gradient_scale), self.moments(owned.name)
        cached = owned.values.device.type == "cpu"
        for window in owned.windows(CACHED_ELEMENTS * torch.get_num_threads() if cached else UPDATE_ELEMENTS):
            inside = slice(window.begin, window.end)
            values, gradient = owned.values[inside], owned.gradient[inside]
            narrow = gradient.dtype != values.dtype
            gradient = rule.ready(gradient, torch.empty_like(values) if narrow else gradient)
            apply_window(self, values, gradient, [m[inside] for m in moments], rule, window)
            if narrow_values is not None:
                narrow_values[inside].copy_(values)


@dataclass
class AdamW(_Keeping):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019); moments in the masters' dtype.

    Its state is "exp_avg" and "exp_avg_sq", flat, and the number of updates "step", which is always on the host.
    """

    names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    def prepare(self, owned: OwnedTensor) -> None:
        """See `_Keeping`."""
        super().prepare(owned)
        self._state[owned.name]["step"] = torch.zeros((), dtype=torch.float32)

    def begin(self, name: str, lr: float, gradient_scale: float) -> Rule:
        """See `Optimizer`."""
        step = self._state[name]["step"]
        step += 1
        return Rule(int(step), lr, gradient_scale)

    def apply(self, values: Tensor, gradient: Tensor, moments: Sequence[Tensor], rule: Rule, *, decays: bool) -> None:
        """See `Optimizer`."""
        # The kernel wants its count where the values are, and counts up; filling it there makes nobody wait.
        count = torch.full((), rule.count - 1, dtype=torch.float32, device=values.device)
        adamw(
            [values],
            [gradient],
            [moments[0]],
            [moments[1]],
            [],
            [count],
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=rule.lr,
            weight_decay=self.weight_decay if decays else 0.0,
            eps=self.eps,
            maximize=False,
        )


@dataclass
class SGD(_Keeping):
    """Stochastic gradient descent with momentum; weight decay is added to the gradient, as in torch.

    Its state is the momentum "momentum", flat.
    """

    names: ClassVar[tuple[str, ...]] = ("momentum",)
    momentum: float
    weight_decay: float

    def apply(self, values: Tensor, gradient: Tensor, moments: Sequence[Tensor], rule: Rule, *, decays: bool) -> None:
        """See `Optimizer`."""
        sgd(
            [values],
            [gradient],
            [moments[0]],
            fused=True,
            weight_decay=self.weight_decay if decays else 0.0,
            momentum=self.momentum,
            lr=rule.lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


def make_optimizer(spec: TrainSpec, owned: Iterable[OwnedTensor] = ()) -> AdamW | SGD:
    """The optimizer that `train.optimizer` names, with fresh state for these owned tensors, where each says."""
    optimizer = (
        SGD(spec.momentum, spec.weight_decay)
        if spec.optimizer == "sgd"
        else AdamW((spec.betas[0], spec.betas[1]), spec.eps, spec.weight_decay)
    )
    for tensor in owned:
        optimizer.prepare(tensor)
    return optimizer
