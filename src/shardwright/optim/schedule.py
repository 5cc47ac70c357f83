"""Learning-rate schedules: the rate of a step, a pure function of the recipe."""

from __future__ import annotations

import math

from shardwright.spec.train import TrainSpec


def learning_rate(train: TrainSpec, step: int) -> float:
    """The learning rate of step 0, 1, ...: linear warmup to `lr`, then the schedule down to lr * min_lr_ratio.

    cosine and linear fall over the steps after warmup; wsd (warmup, stable, decay: Hu et al. 2024) stays at `lr` and
    falls linearly over the last `decay_fraction` of all steps; constant stays.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    floor = train.lr * train.min_lr_ratio
    start = train.warmup_steps
    if train.lr_schedule == "wsd":
        start = train.steps - round(train.decay_fraction * train.steps)
    progress = min(max((step - start) / max(train.steps - start, 1), 0.0), 1.0)
    remaining = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "wsd": 1.0 - progress,
        "cosine": (1.0 + math.cos(math.pi * progress)) / 2,
    }[train.lr_schedule]
    return floor + (train.lr - floor) * remaining
