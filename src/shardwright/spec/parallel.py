"""`[parallel]`: the degrees of the mesh, who owns what, and the pipeline's schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shardwright.spec.section import Positive, Section

Auto = Literal["auto"]


class ParallelSpec(Section):
    """dp x pp x tp ranks; dp is replicate x shard, and `dp_shard` data ranks share one sharded copy."""

    dp: Positive | Auto = "auto"  # auto fills the world
    tp: Positive = 1
    pp: Positive = 1
    zero: Literal[0, 1, 2, 3] = 1
    dp_shard: Positive | Auto = "auto"  # auto: all of dp
    zero_pipeline: Literal["save_memory", "save_communication"] = "save_memory"
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zbv"] = "1f1b"
    virtual_stages: Positive = 1  # stages of each rank, with interleaved; zbv means 2
    stages: Annotated[tuple[Positive, ...], Field(min_length=1)] | Auto = "auto"  # layers per virtual stage
    sequence_parallel: bool = True
    order: str = "replicate,pp,shard,tp"  # of the mesh's axes, outer to inner
