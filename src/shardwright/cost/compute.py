"""FLOPs of a model's parts, and of pipeline stages made of them, in closed form.

Counted as the engine computes it, not by the convention of MFU (`Architecture.flops_per_token`): causal attention reads
half of the sequence, and the head's three products are all in the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardwright.schedule.action import StageCost
from shardwright.spec.architecture import Architecture

_FLOPS_PER_ELEMENT_MOVED = 100
"""FLOPs of matrix products in the time that one element takes to or from memory.

An H100's data sheet gives 590 in bf16 (989e12 FLOP/s over 3.35e12 bytes/s, 2 bytes each), and a CPU core is nearer to
50 in fp32. The embedding alone is counted by it, a hundredth of a layer, so that the order of magnitude is enough.
"""


def total(cost: StageCost) -> float:
    """F, I and W together."""
    return cost.forward + cost.input + cost.weight


@dataclass(frozen=True)
class ModelCost:
    """FLOPs of one microbatch in the embedding, in one layer, and in the head with the loss.

    Biases, norms, activations and rotations are left out: a few percent of every layer alike. So is `tp`, which divides
    every part by the same degree. A tied matrix costs what an untied one costs.
    """

    embedding: StageCost
    layer: StageCost
    head: StageCost

    def stages(self, layers_per_stage: Sequence[int]) -> tuple[StageCost, ...]:
        """Costs of stages in the order of the model: the first has the embedding, the last the head."""
        last = len(layers_per_stage) - 1
        costs = []
        for stage, layers in enumerate(layers_per_stage):
            parts = [(self.embedding, int(stage == 0)), (self.layer, layers), (self.head, int(stage == last))]
            costs.append(
                StageCost(
                    forward=sum(part.forward * count for part, count in parts),
                    input=sum(part.input * count for part, count in parts),
                    weight=sum(part.weight * count for part, count in parts),
                )
            )
        return tuple(costs)

    def in_layers(self, part: StageCost) -> float:
        """As how many layers a part weighs, F, I and W together."""
        return total(part) / total(self.layer)


def model_cost(architecture: Architecture, sequence_length: int, tokens: int) -> ModelCost:
    """What a microbatch of `tokens` tokens costs, in sequences of `sequence_length`."""
    a = architecture
    products = 2.0 * a.layer_matrix_parameters * tokens
    # Scores and weighted values, each over the half of the sequence that a token sees on average; the backward of each
    # product is two products, and both count in I: neither is the gradient of a weight.
    attention = 2 * 2.0 * (sequence_length / 2) * a.heads * a.head_dim * tokens
    moved = float(_FLOPS_PER_ELEMENT_MOVED * a.hidden * tokens)
    return ModelCost(
        # The look-up reads a row and writes it; the backward reads a gradient, and reads and writes a row.
        embedding=StageCost(forward=2 * moved, input=3 * moved, weight=0.0),
        layer=StageCost(forward=products + attention, input=products + 2 * attention, weight=products),
        # See "the head and the cross-entropy are one operation" in nn/loss.py: the backward only scales.
        head=StageCost(forward=6.0 * a.hidden * a.vocab * tokens, input=0.0, weight=0.0),
    )
