"""Architectures: the published sizes, the defaults, and sizes that contradict each other."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from shardwright.errors import RecipeError
from shardwright.spec.architecture import Architecture, architecture_notes, nearest_divisors, resolve_architecture
from shardwright.spec.model import ModelSpec
from shardwright.spec.presets import PRESETS

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}
"""Elements of the released checkpoints."""
ROUNDED = {"megatron-turing-530b": 530e9, "gpt-1t": 1008e9}
"""As their papers print them."""
SMALL = {"tiny": 106_944, "small-5m": 4_558_592, "small-25m": 25_141_760, "small-100m": 100_685_568}
SIZES = {"layers": 2, "hidden": 64, "heads": 4}


def resolve(tokenizer_vocab: int | None = 257, sequence_length: int = 128, **fields) -> Architecture:
    spec = ModelSpec.model_validate(fields)
    return resolve_architecture(spec, sequence_length=sequence_length, tokenizer_vocab=tokenizer_vocab)


def refusal(**fields) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve(**fields)
    return str(caught.value)


@pytest.mark.parametrize(("preset", "parameters"), (PUBLISHED | SMALL).items())
def test_presets_have_their_published_sizes(preset: str, parameters: int) -> None:
    assert resolve(preset=preset).num_parameters == parameters


@pytest.mark.parametrize(("preset", "parameters"), ROUNDED.items())
def test_planning_presets_have_their_papers_sizes(preset: str, parameters: float) -> None:
    assert resolve(preset=preset).num_parameters == pytest.approx(parameters, rel=1e-3)


def test_every_preset_is_tested() -> None:
    assert PRESETS.keys() == (PUBLISHED | SMALL | ROUNDED).keys()


def test_defaults() -> None:
    model = resolve(**SIZES)
    assert (model.kv_heads, model.head_dim, model.ffn, model.vocab, model.max_positions) == (4, 16, 192, 257, 128)
    assert (model.norm, model.activation, model.positions, model.tied_embeddings) == (
        "rmsnorm",
        "swiglu",
        "rotary",
        False,
    )
    assert resolve(hidden=256, layers=6, heads=8).ffn == 704
    assert resolve(**SIZES, activation="gelu").ffn == 256


def test_parameters_of_every_option() -> None:
    """Counted by hand, one option at a time."""
    base = resolve(**SIZES).num_parameters
    added = {
        "qkv_bias": 2 * 3 * 64,
        "bias": 2 * (3 * 64 + 64 + 2 * 192 + 64),
        "qk_norm": 2 * 2 * 16,
        "tied_embeddings": -257 * 64,
    }
    for option, elements in added.items():
        assert resolve(**SIZES, **{option: True}).num_parameters - base == elements
    assert resolve(**SIZES, norm="layernorm").num_parameters - base == 5 * 64
    assert resolve(**SIZES, positions="learned", max_positions=200).num_parameters - base == 200 * 64
    assert resolve(**SIZES, kv_heads=1).num_parameters - base == -2 * 2 * 64 * 48
    assert resolve(**SIZES, ffn=64, activation="gelu", bias=True).layer_parameters == 4 * 64 * 65 + 2 * 64 * 65 + 128


def test_fields_go_over_a_preset() -> None:
    model = resolve(preset="qwen3-0.6b", layers=2, vocab=1000, tied_embeddings=False)
    assert (model.layers, model.hidden, model.vocab, model.tied_embeddings) == (2, 1024, 1000, False)
    assert resolve(preset="small-25m", hidden=256).head_dim == 32


def test_rope_scaling_of_llama() -> None:
    scaling = resolve(preset="llama-3.2-1b").rope_scaling
    assert scaling is not None
    assert scaling.model_dump() == {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_positions": 8192,
    }


def test_flops_per_token() -> None:
    """PaLM's convention on a shape small enough to count: 6 per matrix element, 12 L H D T for attention."""
    model = resolve(**SIZES, ffn=192, tied_embeddings=True)
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 192) + 257 * 64
    assert model.flops_per_token(128) == 6 * matrices + 12 * 2 * 4 * 16 * 128


def test_architecture_survives_json_and_is_frozen() -> None:
    model = resolve(preset="llama-3.1-8b")
    assert Architecture.model_validate_json(model.model_dump_json()) == model
    with pytest.raises(ValidationError):
        model.layers = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "model.layers: not given\n  give model.layers, model.hidden, model.heads, or model.preset, e.g. small-5m"),
        ({"layers": 2, "heads": 4}, "model.hidden: not given\n  give model.hidden, or model.preset, e.g. small-5m"),
        (
            {"layers": 2, "hidden": 64, "heads": 6},
            "model.heads: 6 does not divide model.hidden = 64\n"
            "  nearest that works: heads = 4 or 8, or give model.head_dim",
        ),
        (
            SIZES | {"kv_heads": 3},
            "model.kv_heads: 3 does not divide model.heads = 4\n  nearest that works: kv_heads = 2 or 4",
        ),
        (
            SIZES | {"head_dim": 15},
            "model.head_dim: 15 is odd, and rotary positions turn pairs of elements\n"
            "  nearest that works: head_dim = 14 or 16",
        ),
        (
            SIZES | {"vocab": 100},
            "model.vocab: 100 is smaller than the tokenizer's 257\n  give model.vocab = 257 or more, or leave it out",
        ),
        ({"preset": "llama-3.1-7b"}, 'model.preset: no preset is named "llama-3.1-7b"\n  did you mean llama-3.1-70b?'),
        ({"preset": "x"}, f'model.preset: no preset is named "x"\n  one of: {", ".join(PRESETS)}'),
        (
            {"preset": "gpt2", "config": "config.json"},
            "model.config: given beside model.preset\n  give one of them, and fields over it",
        ),
    ],
)
def test_refusals(fields: dict, message: str) -> None:
    assert refusal(**fields) == message


def test_odd_head_dim_is_fine_with_learned_positions() -> None:
    assert resolve(**SIZES, head_dim=15, positions="learned").head_dim == 15


def test_vocab_without_a_tokenizer() -> None:
    assert refusal(tokenizer_vocab=None, **SIZES) == (
        "model.vocab: not given, and the tokenizer's is not known yet\n  give model.vocab, or prepare the data first"
    )
    assert resolve(tokenizer_vocab=None, **SIZES, vocab=10).vocab == 10
    expected = resolve_architecture(ModelSpec(**SIZES), sequence_length=8, tokenizer_vocab=None, expected_vocab=99)
    assert expected.vocab == 99


def test_learned_positions_must_reach() -> None:
    model = resolve(preset="gpt2", tokenizer_vocab=None)
    model.check_sequence_length(1024)
    with pytest.raises(RecipeError) as caught:
        model.check_sequence_length(2048)
    assert str(caught.value) == (
        "model.max_positions: 1024 learned positions are fewer than train.sequence_length = 2048\n"
        "  what works: train.sequence_length = 1024, or model.max_positions = 2048"
    )


def test_no_notes_without_a_config() -> None:
    assert architecture_notes(ModelSpec(preset="gpt2")) == ()


def test_nearest_divisors() -> None:
    assert nearest_divisors(12, 8) == "4 or 6"
    assert nearest_divisors(7, 3) == "1 or 7"
    assert nearest_divisors(1, 4) == "1"
