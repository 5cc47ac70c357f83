"""FLOPs of a plan: what the model needs by the convention of MFU, and what is done where activations are recomputed."""

from __future__ import annotations

from dataclasses import dataclass

from shardwright.plan.plan import Plan
from shardwright.plan.units import recompute_settings
from shardwright.spec.architecture import Architecture


@dataclass(frozen=True)
class Flops:
    """Matrix FLOPs of a forward and a backward: `model` is what MFU is stated by, `hardware` has recomputation too."""

    model_per_token: int
    hardware_per_token: int
    tokens: int
    devices: int

    @property
    def model_per_step(self) -> int:
        """Of a global batch, over all devices."""
        return self.model_per_token * self.tokens

    @property
    def hardware_per_step(self) -> int:
        """The same with recomputation."""
        return self.hardware_per_token * self.tokens

    @property
    def hardware_per_device(self) -> float:
        """The mean over the devices, of a step."""
        return self.hardware_per_step / self.devices


def flops_of(plan: Plan) -> Flops:
    """The FLOPs of a plan's step."""
    model = plan.architecture.flops_per_token(plan.sequence_length)
    settings = [setting for stage in range(len(plan.layers_per_stage)) for setting in recompute_settings(plan, stage)]
    again = settings.count("full") * recomputed_per_token(plan.architecture, plan.sequence_length)
    return Flops(model, model + again, plan.tokens_per_step, plan.world_size)


def recomputed_per_token(a: Architecture, sequence_length: int) -> int:
    """What full recomputation repeats of a layer: its forward but for the last product, whose result nobody needs.

    In the convention of `Architecture.flops_per_token`. Selective recomputation repeats no product.
    """
    products = 2 * (a.layer_matrix_parameters - a.hidden * a.ffn)
    return products + 4 * a.heads * a.head_dim * sequence_length
