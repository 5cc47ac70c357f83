"""How many layers each pipeline stage gets, so that the ranks of the pipeline have as much to do as each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardwright.cost.compute import ModelCost

_ROUNDING = 1e-9  # of a layer: what sums of costs may differ by


@dataclass(frozen=True)
class Balance:
    """Costs in units of a layer: every layer costs 1, the first stage has `embedding` on top, the last has `head`.

    `placement[s]` is the rank of stage s.
    """

    placement: tuple[int, ...]
    embedding: float
    head: float

    @classmethod
    def of(cls, cost: ModelCost, placement: tuple[int, ...]) -> Balance:
        """The balance of a model's stages on the ranks that they are placed on."""
        return cls(placement, cost.in_layers(cost.embedding), cost.in_layers(cost.head))

    def stage_costs(self, stages: Sequence[int]) -> list[float]:
        """The cost of each stage, given its layers."""
        costs = [float(layers) for layers in stages]
        costs[0] += self.embedding
        costs[-1] += self.head
        return costs

    def rank_costs(self, stages: Sequence[int]) -> list[float]:
        """The cost of each rank: the sum over its stages."""
        costs = [0.0] * (max(self.placement) + 1)
        for rank, cost in zip(self.placement, self.stage_costs(stages), strict=True):
            costs[rank] += cost
        return costs

    def split(self, layers: int) -> tuple[int, ...]:
        """Layers per stage, at least one each: the least largest cost of a rank, then of a stage.

        Layers cost alike, so giving each layer in turn to whoever it makes least costly is optimal: first to ranks,
        which gives the least largest rank, then to stages as long as their rank stays within that. `layers` are at
        least as many as stages.
        """
        rank_costs = self.rank_costs([1] * len(self.placement))
        for _ in range(layers - len(self.placement)):
            lightest = min(range(len(rank_costs)), key=rank_costs.__getitem__)
            rank_costs[lightest] += 1
        return self._within(max(rank_costs) + _ROUNDING, layers)

    def _within(self, limit: float, layers: int) -> tuple[int, ...]:
        """The split whose largest stage is least, with no rank above the limit."""
        stages = [1] * len(self.placement)
        stage_costs, rank_costs = self.stage_costs(stages), self.rank_costs(stages)
        for _ in range(layers - len(stages)):
            open_ = [stage for stage, rank in enumerate(self.placement) if rank_costs[rank] + 1 <= limit]
            # Among equals the lighter rank, then the later stage: it keeps the activations of fewer microbatches.
            chosen = min(open_, key=lambda stage: (stage_costs[stage], rank_costs[self.placement[stage]], -stage))
            stages[chosen] += 1
            stage_costs[chosen] += 1
            rank_costs[self.placement[chosen]] += 1
        return tuple(stages)
