"""Hugging Face configs: the five families, and every option that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardwright.errors import RecipeError
from shardwright.spec.architecture import Architecture, architecture_notes, resolve_architecture
from shardwright.spec.model import ModelSpec

ROPE = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": ROPE,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
}
QWEN3 = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}
MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
GPT2 = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
    "layer_norm_epsilon": 1e-05,
    "initializer_range": 0.02,
    "resid_pdrop": 0.1,
    "attn_pdrop": 0.0,
}


@pytest.fixture
def config(tmp_path: Path):
    def write(content: dict | str) -> Path:
        path = tmp_path / "config.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def resolve(path: Path, sequence_length: int = 256, **fields) -> Architecture:
    spec = ModelSpec.model_validate({"config": str(path)} | fields)
    return resolve_architecture(spec, sequence_length=sequence_length, tokenizer_vocab=None)


def refusal(path: Path, **fields) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve(path, **fields)
    prefix = f"model.config: {path}: "
    assert str(caught.value).startswith(prefix)
    return str(caught.value).removeprefix(prefix)


@pytest.mark.parametrize(
    ("content", "preset"), [(LLAMA, "llama-3.2-1b"), (QWEN3, "qwen3-0.6b"), (GPT2, "gpt2")], ids=lambda x: str(x)[:9]
)
def test_config_equals_preset(config, content: dict, preset: str) -> None:
    other = resolve_architecture(ModelSpec(preset=preset), sequence_length=256, tokenizer_vocab=None)
    assert resolve(config(content)) == other


def test_published_sizes(config) -> None:
    assert resolve(config(QWEN2)).num_parameters == 494_032_768
    assert resolve(config(MISTRAL), max_positions=4096).num_parameters == 7_241_732_096


def test_a_directory_and_fields_over_it(config) -> None:
    model = resolve(config(LLAMA).parent, layers=2)
    assert (model.layers, model.hidden) == (2, 2048)


def test_rope_parameters_of_newer_files(config) -> None:
    content = {key: value for key, value in LLAMA.items() if not key.startswith("rope")}
    newer = resolve(config(content | {"rope_parameters": ROPE | {"rope_theta": 500000.0}}))
    assert newer == resolve(config(LLAMA))


def test_biases_of_llama(config) -> None:
    assert resolve(config(LLAMA | {"attention_bias": True, "mlp_bias": True})).bias
    assert refusal(config(LLAMA | {"attention_bias": True})) == (
        "attention_bias = true with mlp_bias = false is not built\n  what works: both alike"
    )


def test_dropout_is_told(config) -> None:
    path = config(GPT2)
    assert architecture_notes(ModelSpec(config=str(path))) == (f"resid_pdrop = 0.1 in {path}: trained without dropout",)


def test_sliding_window(config) -> None:
    path = config(MISTRAL)
    assert refusal(path) == (
        "sliding_window = 4096 is not built, and sequences reach 32768\n"
        "  model.max_positions = 4096 (and no longer train.sequence_length) stays inside the window"
    )
    assert resolve(path, max_positions=4096).max_positions == 4096
    assert "sequences reach 8192" in refusal(path, max_positions=4096, sequence_length=8192)
    assert resolve(config(MISTRAL | {"sliding_window": None})).max_positions == 32768
    assert "sliding_window = 4096" in refusal(config(QWEN3 | {"use_sliding_window": True, "sliding_window": 4096}))
    mixed = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 128}
    assert "sliding_window = 128" in refusal(config(QWEN3 | mixed))
    assert resolve(config(MISTRAL | {"layer_types": ["full_attention"]})).layers == 32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"model_type": "llama4"},
            'model_type "llama4" is not built\n  what works: llama, qwen2, qwen3, mistral, gpt2 (nearest: llama)',
        ),
        ({"model_type": "bert"}, 'model_type "bert" is not built\n  what works: llama, qwen2, qwen3, mistral, gpt2'),
        ({}, '"model_type" is missing\n  it must hold the model\'s own config.json'),
        (LLAMA | {"hidden_act": "gelu"}, 'hidden_act = "gelu" is not built\n  what works: "silu", "swish"'),
        (LLAMA | {"hidden_size": "2k"}, '"hidden_size": "2k" is not of type int\n  mend the file'),
        (LLAMA | {"hidden_size": None}, '"hidden_size" is missing\n  it must hold the model\'s own config.json'),
        (
            LLAMA | {"rope_scaling": {"type": "yarn", "factor": 2}},
            'rope type "yarn" is not built\n  what works: "default" and "llama3"',
        ),
        (
            LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            'rope scaling "llama3" lacks "low_freq_factor"\n  it must hold the model\'s own config.json',
        ),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not built\n  what works: 1.0"),
        (QWEN3 | {"attention_bias": True}, "attention_bias = true is not built\n  what works: false"),
        (
            GPT2 | {"activation_function": "gelu"},
            'activation_function = "gelu" is not built\n  what works: "gelu_new", "gelu_pytorch_tanh"',
        ),
        (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights = false is not built\n  what works: true"),
        (
            GPT2 | {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx = true is not built\n  what works: false",
        ),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention = true is not built\n  what works: false"),
        ("{", "not JSON\n  give the path of a model's config.json"),
        ("[]", "not a JSON object\n  give the path of a model's config.json"),
    ],
)
def test_refusals(config, content: dict | str, message: str) -> None:
    assert refusal(config(content)) == message


def test_missing_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.json") == (
        "cannot be read: No such file or directory\n  give the path of a config.json or of the directory that holds it"
    )


def test_wrong_size_in_the_file_names_the_field(config) -> None:
    with pytest.raises(RecipeError, match=r"model\.layers: 0 is out of range\n  it must be at least 1"):
        resolve(config(LLAMA | {"num_hidden_layers": 0}))
