"""`[model]`: the architecture as asked for; what is left out comes from a preset, a config or a default."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from shardwright.spec.section import AboveZero, FieldProblem, Positive, Section

Norm = Literal["rmsnorm", "layernorm"]
Activation = Literal["swiglu", "gelu"]
Positions = Literal["rotary", "learned"]


class RopeScaling(Section):
    """Llama 3's scaling of rotary frequencies (Llama 3.1 release, `apply_scaling`); factor 1 scales nothing."""

    factor: AboveZero
    low_freq_factor: AboveZero = 1.0
    high_freq_factor: AboveZero = 4.0
    original_max_positions: Positive

    @model_validator(mode="after")
    def _ordered(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise FieldProblem(
                f"high_freq_factor = {self.high_freq_factor:g} is not above low_freq_factor = {self.low_freq_factor:g}",
                "Llama 3 has high_freq_factor = 4.0 and low_freq_factor = 1.0",
            )
        return self


class ModelSpec(Section):
    """Fields over a preset or a Hugging Face config.json; None says nothing and takes theirs, or the default."""

    preset: str = ""  # a name in spec/presets.py
    config: str = ""  # path of a Hugging Face config.json, or of the directory that holds it
    layers: Positive | None = None
    hidden: Positive | None = None
    heads: Positive | None = None
    kv_heads: Positive | None = None  # default: heads
    head_dim: Positive | None = None  # default: hidden / heads
    ffn: Positive | None = None  # default: 8/3 hidden to the next 64 for swiglu, 4 hidden for gelu
    vocab: Positive | None = None  # default: the tokenizer's
    tied_embeddings: bool | None = None
    norm: Norm | None = None
    norm_eps: AboveZero | None = None
    activation: Activation | None = None  # gelu is GPT-2's, with tanh
    positions: Positions | None = None
    rope_theta: AboveZero | None = None
    rope_scaling: RopeScaling | None = None
    max_positions: Positive | None = None  # default: train.sequence_length
    qkv_bias: bool | None = None
    bias: bool | None = None  # of every linear in the layers, as in GPT-2
    qk_norm: bool | None = None
    init_std: AboveZero | None = None
    init_from: str = ""  # a checkpoint or a Hugging Face directory: weights only, fresh optimizer
