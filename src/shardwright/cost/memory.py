"""Bytes of training state per rank, in closed form: the ZeRO paper's table (Rajbhandari et al. 2020, figure 1)."""

from __future__ import annotations

from shardwright.cost.units import embedding_parameters, layer_parameters, norm_parameters, word_parameters
from shardwright.record.records import MemoryRecord, Origin
from shardwright.spec.architecture import Architecture
from shardwright.units import Bytes

BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
MOMENTS = {"adamw": 2, "sgd": 1}


def held_parameters(
    a: Architecture, tp: int, index: int, *, layers: int | None = None, embedding: bool = True, head: bool = True
) -> int:
    """Parameters that rank `index` of a `tp` axis has: its part of the matrices, and all of what is replicated.

    Of a model cut into stages it holds `layers` (None: all), the embedding and the head with the final norm where its
    stages have them. A tied matrix is held by both, once where one rank has both.
    """

    words = word_parameters(a, tp, index)
    total = (a.layers if layers is None else layers) * sum(layer_parameters(a, tp, index))
    if embedding:
        total += words + sum(embedding_parameters(a))
    if head:
        total += sum(norm_parameters(a)) + (0 if embedding and a.tied_embeddings else words)
    return total


def state_memory(
    num_parameters: int,
    *,
    zero: int,
    owners: int,
    dtype: str,
    grad_dtype: str,
    optimizer: str,
    per_microbatch: bool = True,
    offload: str = "none",
    rank: int = 0,
) -> MemoryRecord:
    """What a rank holds between microbatches, for `num_parameters` shared by `owners` ranks, padding apart.

    Offload takes masters, where they are apart, and moments to the host; see `host_bytes`.

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
    of_optimizer = state * (moments + (master if master != compute else 0))
    return MemoryRecord(
        origin=Origin.ESTIMATED,
        rank=rank,
        parameters=Bytes(round(parameters)),
        gradients=Bytes(round(gradients)),
        optimizer=Bytes(round(of_optimizer if offload == "none" else 0)),
        communication=Bytes(round(transient)),
        padding=Bytes(0),
        host=Bytes(round(state * host_bytes(dtype, grad_dtype, optimizer, offload))),
    )


def host_bytes(dtype: str, grad_dtype: str, optimizer: str, offload: str) -> int:
    """Of an owned parameter, on its owner's host. `state`: moments, and the masters where they are more exact than what
    computes. `update`: both always, and room for the gradient to land in."""
    master = max(BYTES[dtype], 4)
    moments = MOMENTS[optimizer] * master
    if offload == "update":
        return master + moments + BYTES[grad_dtype]
    return {"none": 0, "state": moments + (master if master != BYTES[dtype] else 0)}[offload]


def saved_bytes(dtype: str, optimizer: str) -> int:
    """Of a parameter in a checkpoint, and in the host memory that its owners keep to write it from."""
    return (1 + MOMENTS[optimizer]) * max(BYTES[dtype], 4)


def streamed_bytes(dtype: str, grad_dtype: str, optimizer: str) -> int:
    """Of an element that streams through a slot under `state`: its masters where they are apart, its moments, and its
    gradient where that has to be cast."""
    master = max(BYTES[dtype], 4)
    return ((master != BYTES[dtype]) + MOMENTS[optimizer] + (master != BYTES[grad_dtype])) * master
