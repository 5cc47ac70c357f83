"""What a rank of a plan has: its units by stage and block, their sizes, the sizes of its activations."""

from __future__ import annotations

from dataclasses import dataclass

from shardwright.cost.shapes import Shapes
from shardwright.cost.units import (
    UnitSize,
    embedding_parameters,
    layer_parameters,
    layer_partials,
    norm_parameters,
    word_parameters,
)
from shardwright.plan.pipeline import placement_of
from shardwright.plan.plan import Plan


@dataclass(frozen=True)
class RankUnits:
    """A rank's units: by stage and block, those that the block is the first to use.

    `tied` is the embedding's unit where the head, on the same rank, uses it too.
    """

    by_stage: dict[int, tuple[tuple[UnitSize, ...], ...]]
    tied: UnitSize | None

    @property
    def all(self) -> list[UnitSize]:
        """All of them, in the order of the model."""
        return [unit for blocks in self.by_stage.values() for block in blocks for unit in block]

    @property
    def lengths(self) -> list[int]:
        """Their padded lengths in elements."""
        return [unit.length for unit in self.all]


def units_of(plan: Plan, pp: int, tp: int) -> RankUnits:
    """The units at a place of the pipeline and of `tp`.

    A tied matrix that two ranks have is a unit by itself on both; on one rank it belongs to the embedding's.
    """
    a, (degree, dp), placed = plan.architecture, (plan.topology.tp, plan.topology.dp), placement_of(plan)
    sharded = plan.spec.parallel.sequence_parallel and degree > 1
    words, last = word_parameters(a, degree, tp), len(placed) - 1
    apart = a.tied_embeddings and placed[0] != placed[-1]
    twin = UnitSize.of([words], dp, has_twin=True)

    layer = UnitSize.of(layer_parameters(a, degree, tp), dp, layer_partials(a, sharded))
    positions, norm = embedding_parameters(a), norm_parameters(a)
    lookup = UnitSize.of(positions if apart else [words, *positions], dp, positions if sharded else ())
    embedding = (*((twin,) if apart else ()), *((lookup,) if lookup.length else ()))
    output = UnitSize.of(norm if a.tied_embeddings else [*norm, words], dp, norm if sharded else ())
    head = (twin, output) if apart else (output,)
    by_stage = {}
    for stage, of in enumerate(placed):
        if of == pp:
            blocks = [embedding] * (stage == 0) + [(layer,)] * plan.layers_per_stage[stage] + [head] * (stage == last)
            by_stage[stage] = tuple(blocks)
    return RankUnits(by_stage, lookup if a.tied_embeddings and not apart and last in by_stage else None)


def representative(plan: Plan, tp: int) -> int:
    """The first of the ranks along `tp` whose parameters have the sizes of this one's."""
    a, degree = plan.architecture, plan.topology.tp

    def held(index: int) -> tuple[list[int], int]:
        return layer_parameters(a, degree, index), word_parameters(a, degree, index)

    return next(index for index in range(tp + 1) if held(index) == held(tp))


def shapes_of(plan: Plan, tp: int) -> Shapes:
    """The sizes of one microbatch's activations at a place of `tp`."""
    return Shapes(
        plan.architecture,
        plan.sequence_length,
        plan.spec.train.micro_batch_size,
        plan.topology.tp,
        tp,
        plan.spec.parallel.sequence_parallel,
        plan.dtype,
        plan.grad_dtype,
        plan.device,
    )


def recompute_settings(plan: Plan, stage: int) -> list[str]:
    """The setting of recomputation of each of a stage's layers: none, selective or full."""
    memory, begin = plan.spec.memory, sum(plan.layers_per_stage[:stage])
    chosen = memory.recompute_layers
    return [
        memory.recompute if isinstance(chosen, str) or layer in chosen else "none"
        for layer in range(begin, begin + plan.layers_per_stage[stage])
    ]
