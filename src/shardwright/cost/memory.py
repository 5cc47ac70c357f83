"""Bytes of training state per rank, in closed form: the ZeRO paper's table (Rajbhandari et al. 2020, figure 1)."""

from __future__ import annotations

from collections.abc import Callable

from shardwright.layout.split import even_split, kv_heads_for
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

    def part(length: int) -> int:
        begin, end = even_split(length, tp, index)
        return end - begin

    words = part(a.vocab) * a.hidden
    total = (a.layers if layers is None else layers) * _held_of_layer(a, tp, index, part)
    if embedding:
        total += words + (a.max_positions * a.hidden if a.positions == "learned" else 0)
    if head:
        total += a.norm_parameters + (0 if embedding and a.tied_embeddings else words)
    return total


def _held_of_layer(a: Architecture, tp: int, index: int, part: Callable[[int], int]) -> int:
    d, ffn = a.head_dim, part(a.ffn)
    first, last = kv_heads_for(a.heads, a.kv_heads, tp, index)
    queries, qkv = part(a.heads) * d, (part(a.heads) + 2 * (last - first)) * d
    products = 3 if a.activation == "swiglu" else 2
    layer = a.hidden * (qkv + queries) + products * a.hidden * ffn + 2 * a.norm_parameters
    layer += (2 * d if a.qk_norm else 0) + (qkv if a.bias or a.qkv_bias else 0)
    return layer + ((2 * a.hidden + (products - 1) * ffn) if a.bias else 0)


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
