"""`[train]`: how long, in which batches and precision, with which optimizer and learning rate."""

from __future__ import annotations

from typing import Literal

from shardwright.spec.section import AboveZero, Count, Fraction, NotNegative, Positive, Section, Share

Dtype = Literal["bf16", "fp32", "fp64"]


class TrainSpec(Section):
    """One optimizer step and how many of them. Lengths are in tokens, batches in sequences."""

    steps: Positive = 150  # the schedule's horizon
    stop_after: Count = 0  # end early without changing the schedule; 0: run all steps
    sequence_length: Positive = 256
    global_batch_size: Positive = 16  # sequences in a step
    micro_batch_size: Positive = 2  # sequences in one forward of one data rank
    dtype: Literal["auto", "bf16", "fp32", "fp64"] = "auto"  # auto: bf16 where computed natively, else fp32
    grad_dtype: Dtype = "fp32"  # dtype of accumulated gradients
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)  # adamw
    eps: AboveZero = 1e-8  # adamw
    weight_decay: NotNegative = 0.1  # of matrices only
    momentum: Fraction = 0.9  # sgd
    lr: AboveZero = 1e-3
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: Count = 10
    decay_fraction: Share = 0.2  # share of the steps in which wsd decays
    min_lr_ratio: Share = 0.1
    max_grad_norm: NotNegative = 1.0  # 0: no clipping
    max_nonfinite_steps: Positive = 5  # skipped in a row before the run stops
    seed: Count = 0
