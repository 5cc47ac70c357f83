"""What offload keeps in host memory, in closed form, and whether the hosts have it."""

from __future__ import annotations

from shardwright.cost.memory import host_bytes, streamed_bytes
from shardwright.errors import LayoutError
from shardwright.layout.chunk import GRAIN
from shardwright.plan.memory import parameters_of_rank
from shardwright.plan.plan import Plan
from shardwright.units import Bytes, format_bytes, parse_bytes

FORMS = ("state", "update")


def host_memory(plan: Plan, rank: int) -> Bytes:
    """What offload keeps on the host for a rank, padding apart."""
    return _host_memory(plan, rank, plan.spec.memory.offload, plan.spec.parallel.zero)


def most_host_memory(plan: Plan) -> Bytes:
    """The most of any rank."""
    return Bytes(_fullest_host(plan, 1, plan.spec.memory.offload, plan.spec.parallel.zero))


def _host_memory(plan: Plan, rank: int, offload: str, zero: int) -> Bytes:
    owners = plan.topology.shard if zero >= 1 else 1
    each = host_bytes(plan.dtype, plan.grad_dtype, plan.spec.train.optimizer, offload)
    return Bytes(round(parameters_of_rank(plan, rank) * each / owners))


def check_host(plan: Plan, ranks_per_host: int, available: Bytes | None = None) -> None:
    """Raises LayoutError where the ranks of a host keep more on it than `memory.host_limit`, or where that is not given
    than `available`; None does not check that. Ranks fill hosts in order."""
    memory = plan.spec.memory
    limit = parse_bytes(memory.host_limit) if memory.host_limit else available
    if limit is None or memory.offload == "none":
        return
    needed = _fullest_host(plan, ranks_per_host, memory.offload, plan.spec.parallel.zero)
    if needed <= limit:
        return
    ranks = min(ranks_per_host, plan.world_size)
    keeps = f'memory.offload = "{memory.offload}" keeps {format_bytes(needed)} on a host of {ranks} ranks'
    ways = _ways_out(plan, ranks_per_host, limit)
    if memory.host_limit:
        raise LayoutError(f'memory.host_limit: "{memory.host_limit}", but {keeps}', ways)
    raise LayoutError(f"memory.host_limit: {format_bytes(limit)} is what the host has, but {keeps}", ways)


def _fullest_host(plan: Plan, ranks_per_host: int, offload: str, zero: int) -> int:
    def place(rank: int) -> tuple[int, int]:
        here = plan.topology.coordinate(rank)
        return here.pp, here.tp  # ranks that differ along the data axes keep equally much

    first_at = {place(rank): rank for rank in reversed(range(plan.world_size))}
    kept = {where: _host_memory(plan, rank, offload, zero) for where, rank in first_at.items()}
    of_rank = [kept[place(rank)] for rank in range(plan.world_size)]
    return max(sum(of_rank[first : first + ranks_per_host]) for first in range(0, plan.world_size, ranks_per_host))


def _ways_out(plan: Plan, ranks_per_host: int, limit: int) -> str:
    """What would fit, or what least is needed."""
    zero, memory = plan.spec.parallel.zero, plan.spec.memory
    choices = [(zero, offload) for offload in FORMS] + [(1, offload) for offload in FORMS if zero == 0]
    fitting = []
    for stage, offload in choices:
        if _fullest_host(plan, ranks_per_host, offload, stage) <= limit:
            changes = [f"parallel.zero = {stage}"] * (stage != zero)
            fitting.append(" with ".join(changes + [f'memory.offload = "{offload}"'] * (offload != memory.offload)))
    if fitting:
        return f"what fits: {', or '.join(fitting)}"
    return "own less on each host: fewer ranks on it, or a larger parallel.dp_shard with parallel.zero >= 1"


def check_chunk(plan: Plan) -> None:
    """Raises LayoutError for an `offload_chunk` that holds less than one group of elements."""
    memory = plan.spec.memory
    size = streamed_bytes(plan.dtype, plan.grad_dtype, plan.spec.train.optimizer)
    held = parse_bytes(memory.offload_chunk) // size
    if memory.offload == "state" and held < GRAIN:
        raise LayoutError(
            f'memory.offload_chunk: "{memory.offload_chunk}" holds {held} elements of {size} bytes, and {GRAIN} belong '
            "together",
            f'nearest that works: memory.offload_chunk = "{GRAIN * size} B"',
        )
