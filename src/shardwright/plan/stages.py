"""`parallel.pp`, `virtual_stages` and `stages`: how the model is cut for the pipeline, or why it cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from shardwright.cost.compute import model_cost
from shardwright.errors import LayoutError
from shardwright.layout.mesh import Topology
from shardwright.plan.balance import Balance
from shardwright.schedule.build import placement
from shardwright.spec.architecture import Architecture
from shardwright.spec.parallel import ParallelSpec
from shardwright.spec.spec import Spec

_UNBALANCED = 1.25
"""A given split is warned about when its most costly rank costs more than this times that of the balanced one."""

MOST_STAGES_SHOWN = 16
"""Of a pipeline with more stages, the layers of each are summed up in a line."""


@dataclass(frozen=True)
class Stages:
    """Layers of each virtual stage in the order of the model, what was decided, and what to warn about."""

    layers_per_stage: tuple[int, ...]
    decisions: tuple[str, ...]
    warnings: tuple[str, ...]


def resolve_stages(architecture: Architecture, spec: Spec, topology: Topology, world_size: int | None = None) -> Stages:
    """Cut the model into pp x virtual stages, balanced by cost unless the recipe says how. Raises LayoutError.

    `world_size` is the number of ranks that there are, where it is known: a way out keeps to it.
    """
    parallel, layers = spec.parallel, architecture.layers
    schedule, virtual_stages = parallel.pipeline_schedule, _virtual_stages(parallel)
    count = topology.pp * virtual_stages
    if layers < count:
        raise _too_few_layers(layers, spec, virtual_stages, world_size)
    cost = model_cost(architecture, spec.train.sequence_length, tokens=1)
    balance = Balance.of(cost, placement(schedule, topology.pp, virtual_stages))
    balanced = balance.split(layers)
    decisions, warnings = [], []
    if virtual_stages != parallel.virtual_stages:
        decisions.append(f"parallel.virtual_stages = {virtual_stages}: {schedule} places two stages on each rank")
    if schedule == "interleaved" and virtual_stages == 1 and topology.pp > 1:
        warnings.append("parallel.virtual_stages = 1: interleaved with one stage on each rank is 1f1b")
    if parallel.stages == "auto":
        if count > 1:
            decisions.append(_balanced_note(balance, balanced))
        return Stages(balanced, tuple(decisions), tuple(warnings))
    _check_stages(parallel.stages, layers, balanced)
    warnings += _unbalanced(balance, parallel.stages, balanced)
    return Stages(parallel.stages, tuple(decisions), tuple(warnings))


def _virtual_stages(parallel: ParallelSpec) -> int:
    """Stages of each rank."""
    asked, schedule = parallel.virtual_stages, parallel.pipeline_schedule
    if schedule == "zbv":
        if asked > 2:
            raise LayoutError(
                f"parallel.virtual_stages: {asked}, but zbv places two stages on each rank",
                'what works: virtual_stages = 2, or pipeline_schedule = "interleaved"',
            )
        return 2
    if schedule != "interleaved" and asked != 1:
        raise LayoutError(
            f"parallel.virtual_stages: {asked}, but {schedule} places one stage on each rank",
            'what works: virtual_stages = 1, or pipeline_schedule = "interleaved"',
        )
    return asked


def _too_few_layers(layers: int, spec: Spec, virtual_stages: int, world_size: int | None) -> LayoutError:
    """A stage has at least one layer: fewer ranks, fewer stages on each, or more layers."""
    parallel = spec.parallel
    pp, count = parallel.pp, parallel.pp * virtual_stages
    ways = [_fewer_ranks(layers // virtual_stages, spec, world_size)] if layers >= virtual_stages else []
    if virtual_stages > 1 and layers >= pp:
        zbv = parallel.pipeline_schedule == "zbv"
        ways.append('pipeline_schedule = "zb-h1"' if zbv else f"parallel.virtual_stages = {layers // pp}")
    ways.append(f"model.layers = {count}")
    field, stages = "parallel.pp", f"{pp} stages"
    if virtual_stages > 1:
        field = "parallel.virtual_stages" if layers >= pp else field
        stages = f"pp x virtual_stages = {pp} x {virtual_stages} = {count} stages"
    return LayoutError(
        f"{field}: {stages} are more than model.layers = {layers}", f"nearest that works: {', or '.join(ways)}"
    )


def _fewer_ranks(most: int, spec: Spec, world_size: int | None) -> str:
    """The largest pp up to `most`; where dp fills a world, one that keeps to it and divides the batch, if there is."""
    batch, micro, tp = spec.train.global_batch_size, spec.train.micro_batch_size, spec.parallel.tp
    if world_size is None or spec.parallel.dp != "auto":
        return f"parallel.pp = {most}"
    for pp in range(most, 0, -1):
        dp, rest = divmod(world_size, pp * tp)
        if rest == 0 and batch % (dp * micro) == 0:
            return f"parallel.pp = {pp}"
    return f"parallel.pp = {most} in a world of {most * tp}"


def _check_stages(stages: tuple[int, ...], layers: int, balanced: tuple[int, ...]) -> None:
    shown, count = show_stages(stages), len(balanced)
    if len(stages) != count:
        raise LayoutError(
            f"parallel.stages: {shown} names {len(stages)} stages, but pp x virtual_stages = {count}",
            f"what works: {count} numbers, e.g. stages = {show_stages(balanced)}",
        )
    if sum(stages) != layers:
        raise LayoutError(
            f"parallel.stages: {shown} adds up to {sum(stages)}, but model.layers = {layers}",
            f"what works: numbers that add up to {layers}, e.g. stages = {show_stages(balanced)}",
        )


def _balanced_note(balance: Balance, stages: tuple[int, ...]) -> str:
    head = f"{balance.head:.2g} layer{'' if f'{balance.head:.2g}' == '1' else 's'}"
    return f"parallel.stages = {show_stages(stages)}: balanced by cost, the head weighs as much as {head}"


def _unbalanced(balance: Balance, stages: tuple[int, ...], balanced: tuple[int, ...]) -> list[str]:
    costs = balance.rank_costs(stages)
    worst, least = max(costs), max(balance.rank_costs(balanced))
    if worst <= _UNBALANCED * least:
        return []
    return [
        f"parallel.stages = {show_stages(stages)}: pipeline rank {costs.index(worst)} costs {worst / least:.2f} times "
        f"what the costliest rank does with {show_stages(balanced)}"
    ]


def show_stages(stages: Sequence[int]) -> str:
    """Layers per stage as a list, and a long one by its runs: [5, 3], [7, 8 (30 times), 7]."""
    if len(stages) <= MOST_STAGES_SHOWN:
        return str(list(stages))
    runs = [(layers, len(list(run))) for layers, run in groupby(stages)]
    return f"[{', '.join(f'{layers} ({times} times)' if times > 1 else str(layers) for layers, times in runs)}]"
