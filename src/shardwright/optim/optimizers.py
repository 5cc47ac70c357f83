"""AdamW and SGD over owned tensors, computed by torch's own fused kernels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from shardwright.optim.owned import OwnedTensor
from shardwright.spec.train import TrainSpec


def _ready_gradient(owned: OwnedTensor, scale: float) -> Tensor:
    """The scaled gradient in the masters' dtype: in place where it has that dtype already."""
    gradient = owned.gradient.to(owned.values.dtype)
    return gradient if scale == 1.0 else gradient.mul_(scale)


@dataclass
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019); moments in the masters' dtype."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    _state: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def state(self, name: str) -> dict[str, Tensor]:
        """Moments "exp_avg" and "exp_avg_sq", flat, and the number of updates "step"."""
        return self._state[name]

    def prepare(self, owned: OwnedTensor) -> None:
        """Make the state of an owned tensor: zeros."""
        zeros = {key: torch.zeros_like(owned.values) for key in ("exp_avg", "exp_avg_sq")}
        step = torch.zeros((), dtype=torch.float32, device=owned.values.device)
        self._state[owned.name] = {**zeros, "step": step}

    def update(self, owned: OwnedTensor, lr: float, gradient_scale: float) -> None:
        """See `Optimizer`."""
        state = self._state[owned.name]
        gradient = _ready_gradient(owned, gradient_scale)
        before = state["step"].clone()
        for part, decays in owned.parts():
            state["step"].copy_(before)  # the kernel counts up once per call, and both parts are one step
            adamw(
                [owned.values[part]],
                [gradient[part]],
                [state["exp_avg"][part]],
                [state["exp_avg_sq"][part]],
                [],
                [state["step"]],
                fused=True,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=lr,
                weight_decay=self.weight_decay if decays else 0.0,
                eps=self.eps,
                maximize=False,
            )


@dataclass
class SGD:
    """Stochastic gradient descent with momentum; weight decay is added to the gradient, as in torch."""

    momentum: float
    weight_decay: float
    _state: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def state(self, name: str) -> dict[str, Tensor]:
        """The momentum "momentum", flat."""
        return self._state[name]

    def prepare(self, owned: OwnedTensor) -> None:
        """Make the state of an owned tensor: zeros."""
        self._state[owned.name] = {"momentum": torch.zeros_like(owned.values)}

    def update(self, owned: OwnedTensor, lr: float, gradient_scale: float) -> None:
        """See `Optimizer`."""
        gradient = _ready_gradient(owned, gradient_scale)
        momentum = self._state[owned.name]["momentum"]
        for part, decays in owned.parts():
            sgd(
                [owned.values[part]],
                [gradient[part]],
                [momentum[part]],
                fused=True,
                weight_decay=self.weight_decay if decays else 0.0,
                momentum=self.momentum,
                lr=lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )


def make_optimizer(spec: TrainSpec, owned: Iterable[OwnedTensor] = ()) -> AdamW | SGD:
    """The optimizer that `train.optimizer` names, with fresh state for these owned tensors."""
    optimizer = (
        SGD(spec.momentum, spec.weight_decay)
        if spec.optimizer == "sgd"
        else AdamW((spec.betas[0], spec.betas[1]), spec.eps, spec.weight_decay)
    )
    for tensor in owned:
        optimizer.prepare(tensor)
    return optimizer
