"""Validation loss: the mean over the targets of a fixed set of held-out sequences, the same for every layout."""

from __future__ import annotations

import time

import numpy as np
import torch

from shardwright.comm.collectives import all_reduce
from shardwright.data.batch import IGNORED, Batch
from shardwright.data.samples import Samples
from shardwright.parallel.compose import Runtime
from shardwright.record.records import ValidationRecord
from shardwright.train.step import to_device
from shardwright.units import Seconds


def _part(samples: Samples, total: int, runtime: Runtime) -> Batch:
    """This rank's part of the first `total` samples, filled up with rows without loss: under ZeRO-3 every rank must run
    as many forwards as every other."""
    micro = runtime.plan.spec.train.micro_batch_size
    dp = runtime.mesh.topology.dp
    per_rank = -(-total // (dp * micro)) * micro
    index = runtime.mesh.topology.data_index(runtime.mesh.rank)
    start, stop = (min(i * per_rank, total) for i in (index, index + 1))
    batch = samples.at(range(start, stop))
    missing = per_rank - (stop - start)
    fill = np.zeros((missing, samples.sequence_length), np.int64)
    tokens = np.concatenate([batch.tokens, fill])
    return Batch(tokens, np.concatenate([batch.targets, fill + IGNORED]))


def evaluate(runtime: Runtime, samples: Samples, step: int) -> ValidationRecord:
    """The validation loss after `step` steps, over `data.eval_batches` global batches or all that there is."""
    began = time.perf_counter()
    spec = runtime.plan.spec
    total = min(spec.data.eval_batches * spec.train.global_batch_size, len(samples))
    batch = _part(samples, total, runtime)
    loss = runtime.pipeline.evaluate(to_device(batch, spec.train.micro_batch_size, runtime.mesh.device))
    loss = loss.to(runtime.mesh.device)
    count = torch.tensor(float(batch.num_targets()), dtype=torch.float64, device=runtime.mesh.device)
    all_reduce(loss, runtime.mesh.world, reason="validation").wait()  # each target's loss is on one rank
    all_reduce(count, runtime.mesh.data, reason="validation").wait()
    total_loss, num_targets = float(loss), float(count)
    return ValidationRecord(
        step=step,
        loss=total_loss / max(num_targets, 1),
        num_targets=int(num_targets),
        seconds=Seconds(time.perf_counter() - began),
    )
