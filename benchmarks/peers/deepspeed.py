"""DeepSpeed's ZeRO stages on the plain Llama, updated by torch's fused AdamW, so that nothing is compiled.

CPUs have no streams: its collectives block, and `overlap_comm` has nothing to overlap. No setting was seen to be faster
than the defaults beyond the noise of 3 to 7 % (25 M parameters, bf16, 2 ranks on 2 cores, 4 interleaved steps). Tried:
in stages 1 and 2 `overlap_comm`, buckets of 5 M elements, `contiguous_gradients` off, `reduce_scatter` off,
`round_robin_gradients`; in stage 3 `overlap_comm` off, buckets of 5 M elements (3 % slower), a persistence threshold of
1 M (2 % slower), and fetching ahead by 2 M elements, about a layer, which was 2 % faster and is kept. The check for
overflow is off, as the other peers have none. bf16 gradients travel as bf16, its own choice. Masters start from the
bf16 values.
"""

from __future__ import annotations

import logging
import os
import warnings
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.harness import Step
from benchmarks.peers.training import adamw, microbatches, plain_llama, summed
from shardwright.plan.plan import Plan


def available() -> bool:
    """Whether DeepSpeed is installed; it is an optional extra, `bench`."""
    return find_spec("deepspeed") is not None


def _import(rank: int, world: int) -> Any:
    """DeepSpeed for CPUs, quiet, without its shared-memory operation."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), DS_ACCELERATOR="cpu")
    import deepspeed

    # Training never calls it, and the first start on a machine would wait for a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of optimizers that it has not tested
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def deepspeed_zero(rank: int, world: int, *, plan: Plan, dtype: str, stage: int) -> Step:
    """A training step of ZeRO `stage`: bf16 parameters and gradients with fp32 masters, or fp32 throughout."""
    library, train = _import(rank, world), plan.spec.train
    model = plain_llama(plan, dtype)
    config = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": plan.num_microbatches,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": dtype == "bf16", "check_grad_overflow": False},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "stage3_prefetch_bucket_size": 2_000_000,  # elements: about a layer
            "memory_efficient_linear": False,  # it would put its own in the place of F.linear, for other cases as well
        },
    }
    engine, *_ = library.initialize(model=model, optimizer=adamw(model.parameters(), train), config=config)

    def step(index: int) -> float:
        total = torch.zeros(())
        for tokens, targets in microbatches(plan, index, rank, world):
            loss = engine(tokens, targets) / plan.tokens_per_step
            engine.backward(loss * (world * plan.num_microbatches))  # it averages over both
            engine.step()
            total += loss.detach()
        return summed(total)

    return step
