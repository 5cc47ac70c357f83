"""Bytes of training state per rank, in closed form: the ZeRO paper's table (Rajbhandari et al. 2020, figure 1)."""

from __future__ import annotations

from shardwright.record.records import MemoryRecord, Origin
from shardwright.units import Bytes

BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
MOMENTS = {"adamw": 2, "sgd": 1}


def state_memory(
    num_parameters: int,
    *,
    zero: int,
    owners: int,
    dtype: str,
    grad_dtype: str,
    optimizer: str,
    per_microbatch: bool = True,
    rank: int = 0,
) -> MemoryRecord:
    """What a rank holds between microbatches, for `num_parameters` shared by `owners` ranks, padding apart.

    bf16 compute keeps fp32 masters; fp32 and fp64 compute need none beside the parameters. Moments have the masters'
    dtype. With `per_microbatch` false (parallel.zero_pipeline = "save_communication") stages 2 and 3 keep gradients,
    and stage 3 parameters, whole during the step; then the owned share of sharded ones comes on top.
    """
    compute, gradient = BYTES[dtype], BYTES[grad_dtype]
    master = max(compute, 4)
    share = num_parameters / owners
    state = share if zero >= 1 else num_parameters
    moments = MOMENTS[optimizer] * master
    shards_parameters, shards_gradients = zero >= 3 and owners > 1, zero >= 2 and owners > 1
    parameters = share * compute if shards_parameters else num_parameters * compute
    gradients = share * gradient if shards_gradients else num_parameters * gradient
    transient = 0
    if not per_microbatch:
        transient += num_parameters * compute if shards_parameters else 0
        transient += num_parameters * gradient if shards_gradients else 0
    return MemoryRecord(
        origin=Origin.ESTIMATED,
        rank=rank,
        parameters=Bytes(round(parameters)),
        gradients=Bytes(round(gradients)),
        optimizer=Bytes(round(state * (moments + (master if master != compute else 0)))),
        communication=Bytes(round(transient)),
        padding=Bytes(0),
    )
