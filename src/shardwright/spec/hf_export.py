"""An Architecture written as a Hugging Face config.json; `spec/hf_config.py` reads the same Architecture back.

Rotary positions are written as `rope_theta` and `rope_scaling`, which every release of transformers from 4.45 on reads;
`rope_parameters` of newer configs would say it a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwright.spec.architecture import Architecture

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
# Keys of a config that was imported which would contradict what is written: another name of the same thing, the
# quantisation of weights that are written unquantised, code that does not travel with the weights.
_STALE = ("dtype", "rope_parameters", "original_max_position_embeddings", "quantization_config", "auto_map")
_SLIDING = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


def hf_config(architecture: Architecture, family: str, base: Mapping[str, Any] | None, dtype: str) -> dict[str, Any]:
    """The config.json of a model in a family that can express it.

    `base` is the config that the model was imported with; its other keys are kept, such as the ids of special tokens.
    `dtype` is torch's name of the weights' dtype, such as "bfloat16".
    """
    config = {key: value for key, value in (base or {}).items() if key not in _STALE}
    own = _gpt2(architecture, config) if family == "gpt2" else _llama_like(architecture, family, config)
    common = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": architecture.vocab,
        "tie_word_embeddings": architecture.tied_embeddings,
        "initializer_range": architecture.init_std,
        "torch_dtype": dtype,
    }
    # A family's own defaults name tokens of its own tokenizer.
    unknown = {"bos_token_id": None, "eos_token_id": None}
    return unknown | config | common | own


def _llama_like(a: Architecture, family: str, config: dict[str, Any]) -> dict[str, Any]:
    _keep_harmless_window(config, family, a)
    own: dict[str, Any] = {
        "hidden_size": a.hidden,
        "intermediate_size": a.ffn,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": a.max_positions,
        "rms_norm_eps": a.norm_eps,
        "rope_theta": a.rope_theta,
        "rope_scaling": _rope_scaling(a),
    }
    if family == "llama":
        own |= {"attention_bias": a.bias, "mlp_bias": a.bias}
    return own


def _rope_scaling(a: Architecture) -> dict[str, Any] | None:
    scaling = a.rope_scaling
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }


def _keep_harmless_window(config: dict[str, Any], family: str, a: Architecture) -> None:
    """A sliding window that no sequence outgrows masks nothing, and stays as it was; others go."""
    if family == "llama":
        return
    window = config.get("sliding_window", 4096)  # the families' own default
    slides = config.get("model_type") == "mistral" if family == "mistral" else config.get("use_sliding_window") is True
    if slides and isinstance(window, int) and window >= a.max_positions:
        config["sliding_window"] = window
        return
    for key in _SLIDING:
        config.pop(key, None)
    config["sliding_window"] = None
    if family != "mistral":
        config["use_sliding_window"] = False


def _gpt2(a: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = {
        "n_embd": a.hidden,
        "n_inner": a.ffn,
        "n_layer": a.layers,
        "n_head": a.heads,
        "n_positions": a.max_positions,
        "activation_function": config.get("activation_function", "gelu_new"),
        "layer_norm_epsilon": a.norm_eps,
    }
    # Nothing was dropped here; where a config asks for it, it is the user's wish for training elsewhere.
    dropouts = {key: 0.0 for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop") if key not in config}
    return own | dropouts | ({"n_ctx": a.max_positions} if "n_ctx" in config else {})
