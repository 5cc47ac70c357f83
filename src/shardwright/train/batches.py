"""Which sequences a step trains on, and which of them a rank sees: ranges of the stream, cut by coordinate."""

from __future__ import annotations

from shardwright.data.batch import Batch
from shardwright.data.samples import Samples
from shardwright.parallel.compose import Runtime
from shardwright.plan.plan import Plan


def global_positions(plan: Plan, step: int) -> range:
    """Positions in the stream of a step's global batch, step 0 first."""
    size = plan.spec.train.global_batch_size
    return range(step * size, (step + 1) * size)


def rank_batch(runtime: Runtime, samples: Samples, step: int) -> Batch:
    """This rank's sequences of a step's global batch."""
    return batch_at(runtime, samples, global_positions(runtime.plan, step).start)


def batch_at(runtime: Runtime, samples: Samples, position: int) -> Batch:
    """This rank's sequences of the global batch that begins at a position of the stream."""
    per_rank = runtime.plan.spec.train.global_batch_size // runtime.mesh.topology.dp
    first = position + runtime.mesh.topology.data_index(runtime.mesh.rank) * per_rank
    return samples.at(range(first, first + per_rank))
