"""Ranks: how many a recipe asks for, how many this machine starts, how `dp` is divided."""

from __future__ import annotations

from shardwright.errors import LayoutError, RecipeError
from shardwright.layout.mesh import AXES, Topology
from shardwright.spec.architecture import nearest_divisors
from shardwright.spec.spec import Spec


def local_world_size(spec: Spec, *, cores: int, gpus: int) -> int:
    """Ranks that `train` starts on one machine.

    dp x pp x tp where `parallel.dp` is a number; else the largest dp that the machine's GPUs, or its cores where it has
    none, can fill and that divides the global batch; at least pp x tp. Raises LayoutError when GPUs are asked for and
    are too few: over NCCL two ranks cannot share one.
    """
    parallel = spec.parallel
    per_replica = parallel.pp * parallel.tp
    on_gpus = spec.run.device == "cuda" or (spec.run.device == "auto" and gpus > 0)
    world = per_replica * (_largest_dp(spec, (gpus if on_gpus else cores) // per_replica))
    if parallel.dp != "auto":
        world = per_replica * parallel.dp
    shared = spec.run.backend == "gloo" and gpus > 0
    if on_gpus and world > gpus and not shared:
        sharing = 'run.backend = "gloo", so that ranks share GPUs, ' if gpus else ""
        raise LayoutError(
            f"run.device: {world} ranks need {world} GPUs, and this machine has {gpus}",
            f'give run.device = "cpu", {sharing}or a layout of fewer ranks',
        )
    return world


def _largest_dp(spec: Spec, limit: int) -> int:
    """The largest dp up to `limit` that divides the global batch into whole microbatches; at least 1."""
    batch, micro = spec.train.global_batch_size, spec.train.micro_batch_size
    return max((dp for dp in range(1, limit + 1) if batch % (dp * micro) == 0), default=1)


def resolve_topology(spec: Spec, world_size: int | None) -> tuple[Topology, list[str]]:
    """The mesh's degrees, and what was decided. Without a world size, dp = "auto" means 1. Raises LayoutError."""
    parallel = spec.parallel
    per_replica = parallel.pp * parallel.tp
    decisions: list[str] = []
    if parallel.dp == "auto":
        dp = _fill(world_size, parallel.pp, parallel.tp)
        why = "no world size was given" if world_size is None else f"it fills a world of {world_size}"
        decisions.append(f"parallel.dp = {dp}: {why}")
    else:
        dp = parallel.dp
        if world_size not in (None, dp * per_replica):
            raise _mismatch(spec, dp, world_size)
    shard = dp if parallel.dp_shard == "auto" else parallel.dp_shard
    if dp % shard:
        raise LayoutError(
            f"parallel.dp_shard: {shard} does not divide parallel.dp = {dp}",
            f"nearest that works: dp_shard = {nearest_divisors(dp, shard)}",
        )
    if parallel.dp_shard == "auto":
        decisions.append(f"parallel.dp_shard = {shard}: all of dp")
    topology = Topology(
        replicate=dp // shard, pp=parallel.pp, shard=shard, tp=parallel.tp, order=_order(parallel.order)
    )
    return topology, decisions


def _order(text: str) -> tuple[str, ...]:
    """The axes, outer to inner, out of "replicate,pp,shard,tp"."""
    order = tuple(axis.strip() for axis in text.split(","))
    if sorted(order) != sorted(AXES):
        raise RecipeError(
            f'parallel.order: "{text}" does not name each axis of the mesh once', f'the default is "{",".join(AXES)}"'
        )
    return order


def _fill(world_size: int | None, pp: int, tp: int) -> int:
    """The dp that makes dp x pp x tp the world size."""
    if world_size is None:
        return 1
    if world_size % (pp * tp):
        below = world_size // (pp * tp) * pp * tp
        worlds = [str(size) for size in (below, below + pp * tp) if size]
        ways = [f"a world of {' or '.join(worlds)}"]
        if world_size % tp == 0:
            ways.append(f"parallel.pp = {nearest_divisors(world_size // tp, pp)}")
        raise LayoutError(
            f"parallel.dp: a world of {world_size} does not divide by parallel.pp x parallel.tp = {pp} x {tp}",
            f"nearest that works: {', or '.join(ways)}",
        )
    return world_size // (pp * tp)


def _mismatch(spec: Spec, dp: int, world_size: int | None) -> LayoutError:
    pp, tp = spec.parallel.pp, spec.parallel.tp
    problem = f"parallel.dp: dp x pp x tp = {dp} x {pp} x {tp} = {dp * pp * tp} ranks, but the world has {world_size}"
    fits = f"dp = {world_size // (pp * tp)}, or " if world_size and world_size % (pp * tp) == 0 else ""
    return LayoutError(problem, f"what works: {fits}a world of {dp * pp * tp}")


def crosses_nodes(topology: Topology, axes: tuple[str, ...], local_size: int) -> bool:
    """Whether some group of ranks that differ along these axes has ranks on several nodes of `local_size`."""
    reach = sum((topology.degree(axis) - 1) * topology.stride(axis) for axis in axes)
    firsts = {0}  # where groups begin, counted from the beginning of their nodes
    for axis in topology.order:
        if axis not in axes:
            steps = [index * topology.stride(axis) for index in range(topology.degree(axis))]
            firsts = {(first + step) % local_size for first in firsts for step in steps}
    return max(firsts) + reach >= local_size


def crossings(topology: Topology, local_size: int, zero: int) -> tuple[str, ...]:
    """A warning for `tp`, and under ZeRO for `shard`, where groups span nodes of `local_size` ranks."""
    axes = [("tp", "parallel.tp")] + ([("shard", "parallel.dp_shard")] if zero else [])
    return tuple(
        f"{field} = {topology.degree(axis)}: groups cross nodes of {local_size} ranks, where communication is slower"
        for axis, field in axes
        if crosses_nodes(topology, (axis,), local_size)
    )
