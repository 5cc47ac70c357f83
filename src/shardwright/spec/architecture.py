"""`Architecture`: every size of a model, resolved from `[model]`; its parameters and FLOPs in closed form."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError, model_validator

from shardwright.errors import RecipeError
from shardwright.spec.hf_config import read_config
from shardwright.spec.model import Activation, ModelSpec, Norm, Positions, RopeScaling
from shardwright.spec.origin import inherited_fields
from shardwright.spec.presets import PRESETS
from shardwright.spec.problems import as_recipe_error, nearest
from shardwright.spec.section import AboveZero, Positive, Section

_NOT_ARCHITECTURE = ("preset", "config", "init_from")


class Architecture(Section):
    """A complete decoder-only transformer; sizes are global. Raises RecipeError when sizes contradict each other.

    Where a choice leaves room: "gelu" is the tanh form, as in GPT-2; LayerNorm always has a bias; `bias` gives one to
    every linear of the layers and none to the head; `qkv_bias` to query, key and value alone; `qk_norm` is an RMSNorm
    over head_dim with one weight for all query heads and one for all key heads, as in Qwen 3.
    """

    layers: Positive
    hidden: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    ffn: Positive
    vocab: Positive
    tied_embeddings: bool
    norm: Norm
    norm_eps: AboveZero
    activation: Activation
    positions: Positions
    rope_theta: AboveZero
    rope_scaling: RopeScaling | None
    max_positions: Positive
    qkv_bias: bool
    bias: bool
    qk_norm: bool
    init_std: AboveZero

    @model_validator(mode="after")
    def _consistent(self) -> Architecture:
        self.check_heads()
        self.check_rotary()
        return self

    def check_heads(self) -> None:
        """Each KV head serves the same number of query heads."""
        if self.heads % self.kv_heads:
            raise RecipeError(
                f"model.kv_heads: {self.kv_heads} does not divide model.heads = {self.heads}",
                f"nearest that works: kv_heads = {nearest_divisors(self.heads, self.kv_heads)}",
            )

    def check_rotary(self) -> None:
        """Rotary positions turn pairs of a head's elements."""
        if self.positions == "rotary" and self.head_dim % 2:
            raise RecipeError(
                f"model.head_dim: {self.head_dim} is odd, and rotary positions turn pairs of elements",
                f"nearest that works: head_dim = {self.head_dim - 1 or 2} or {self.head_dim + 1}",
            )

    def check_sequence_length(self, sequence_length: int) -> None:
        """Learned positions reach as far as a sequence does."""
        if self.positions == "learned" and self.max_positions < sequence_length:
            raise RecipeError(
                f"model.max_positions: {self.max_positions} learned positions are fewer than "
                f"train.sequence_length = {sequence_length}",
                f"what works: train.sequence_length = {self.max_positions}, or model.max_positions = {sequence_length}",
            )

    @property
    def layer_matrix_parameters(self) -> int:
        """Elements of one layer's matrices."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + (3 if self.activation == "swiglu" else 2) * self.hidden * self.ffn

    @property
    def layer_parameters(self) -> int:
        """Elements of one layer: matrices, biases and norms."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        biases = qkv if self.bias or self.qkv_bias else 0
        if self.bias:
            biases += self.hidden + self.ffn * (2 if self.activation == "swiglu" else 1) + self.hidden
        norms = 2 * self.norm_parameters + (2 * self.head_dim if self.qk_norm else 0)
        return self.layer_matrix_parameters + biases + norms

    @property
    def norm_parameters(self) -> int:
        """Elements of one norm over hidden."""
        return self.hidden * (2 if self.norm == "layernorm" else 1)

    @property
    def embedding_parameters(self) -> int:
        """Elements of the token embedding and of learned positions."""
        return self.hidden * (self.vocab + (self.max_positions if self.positions == "learned" else 0))

    @property
    def head_parameters(self) -> int:
        """Elements of the output matrix that are not the embedding's own."""
        return 0 if self.tied_embeddings else self.vocab * self.hidden

    @property
    def num_parameters(self) -> int:
        """Elements of every parameter; a tied matrix counts once."""
        layers = self.layers * self.layer_parameters
        return self.embedding_parameters + layers + self.norm_parameters + self.head_parameters

    def flops_per_token(self, sequence_length: int) -> int:
        """Model FLOPs of a forward and a backward, per token of a sequence.

        6 x (elements of the layers' matrices and of the head) + 12 x layers x heads x head_dim x sequence_length: the
        convention of PaLM (arXiv 2204.02311, appendix B), in which attention is NOT halved for the causal mask, so
        that MFU compares with published figures. The embedding's look-up is no matrix product; a tied head is one.
        Recomputation is not counted.
        """
        matrices = self.layers * self.layer_matrix_parameters + self.vocab * self.hidden
        attention = self.layers * self.heads * self.head_dim * sequence_length
        return 6 * matrices + 12 * attention


def nearest_divisors(number: int, wanted: int) -> str:
    """The two divisors of `number` that are nearest to `wanted` without being it: "4 or 6"."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0 and divisor != wanted]
    near = sorted(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))[:2]
    return " or ".join(str(divisor) for divisor in sorted(near))


def resolve_architecture(
    model: ModelSpec, *, sequence_length: int, tokenizer_vocab: int | None, expected_vocab: int | None = None
) -> Architecture:
    """The architecture that `[model]` describes: its own fields over its preset or config, and defaults below.

    The vocabulary's default is `tokenizer_vocab`, which it must not be smaller than, or else `expected_vocab`. Raises
    RecipeError.
    """
    fields = _base(model, sequence_length)
    given = model.model_dump(exclude_none=True, exclude=set(_NOT_ARCHITECTURE))
    fields |= given
    _require_sizes(fields)
    fields = architecture_defaults(fields, sequence_length) | fields
    fields.setdefault("vocab", tokenizer_vocab or expected_vocab)
    if fields["vocab"] is None:
        raise RecipeError(
            "model.vocab: not given, and the tokenizer's is not known yet",
            "give model.vocab, or prepare the data first",
        )
    _check_vocab(fields["vocab"], tokenizer_vocab)
    try:
        return Architecture.model_validate(fields)
    except ValidationError as error:
        raise as_recipe_error(error, Architecture, "model.") from None


def architecture_notes(model: ModelSpec) -> tuple[str, ...]:
    """What a Hugging Face config asks for and training here leaves aside, such as dropout."""
    return read_config(model.config).notes if model.config else ()


def _base(model: ModelSpec, sequence_length: int) -> dict[str, Any]:
    """Fields of the preset, of the config, or of the model whose weights are taken."""
    if model.preset and model.config:
        raise RecipeError("model.config: given beside model.preset", "give one of them, and fields over it")
    if model.config:
        longest = max(sequence_length, model.max_positions or 0)
        return read_config(model.config).within_window(longest, limited=model.max_positions is not None)
    if not model.preset:
        return inherited_fields(model, sequence_length) if model.init_from else {}
    if model.preset not in PRESETS:
        near = nearest(model.preset, PRESETS)
        way_out = f"did you mean {near}?" if near else "one of: " + ", ".join(PRESETS)
        raise RecipeError(f'model.preset: no preset is named "{model.preset}"', way_out)
    return dict(PRESETS[model.preset])


def _require_sizes(fields: dict[str, Any]) -> None:
    missing = [name for name in ("layers", "hidden", "heads") if name not in fields]
    if missing:
        raise RecipeError(
            f"model.{missing[0]}: not given",
            f"give {', '.join(f'model.{name}' for name in missing)}, or model.preset, e.g. small-5m",
        )


def architecture_defaults(fields: dict[str, Any], sequence_length: int) -> dict[str, Any]:
    """Defaults of everything but the sizes that must be given and the vocabulary."""
    hidden, heads = fields["hidden"], fields["heads"]
    if "head_dim" not in fields and hidden % heads:
        raise RecipeError(
            f"model.heads: {heads} does not divide model.hidden = {hidden}",
            f"nearest that works: heads = {nearest_divisors(hidden, heads)}, or give model.head_dim",
        )
    swiglu = fields.get("activation", "swiglu") == "swiglu"
    return {
        "kv_heads": heads,
        "head_dim": hidden // heads,
        "ffn": -(-8 * hidden // (3 * 64)) * 64 if swiglu else 4 * hidden,
        "tied_embeddings": False,
        "norm": "rmsnorm",
        "norm_eps": 1e-5,
        "activation": "swiglu",
        "positions": "rotary",
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_positions": sequence_length,
        "qkv_bias": False,
        "bias": False,
        "qk_norm": False,
        "init_std": 0.02,
    }


def _check_vocab(vocab: int, tokenizer_vocab: int | None) -> None:
    if tokenizer_vocab is not None and vocab < tokenizer_vocab:
        raise RecipeError(
            f"model.vocab: {vocab} is smaller than the tokenizer's {tokenizer_vocab}",
            f"give model.vocab = {tokenizer_vocab} or more, or leave it out",
        )
