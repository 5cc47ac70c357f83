"""Hugging Face config.json files read as fields of `[model]`, for the families whose mathematics is built here.

What would change the mathematics and is not built is refused by name; an absent key has its family's default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwright.errors import RecipeError
from shardwright.spec.problems import nearest, show

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt2")
_DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")
_ABSENT = object()


@dataclass(frozen=True)
class ConfigFields:
    """A config as fields of `[model]`, the window its attention slides over if any, and what is left aside."""

    path: Path
    fields: dict[str, Any]
    window: int | None
    notes: tuple[str, ...]
    asked_by: str = "model.config"

    @property
    def whole_window(self) -> int | None:
        """The longest sequence that attention still sees all of, where it slides and that is less than the context;
        else None."""
        short = self.window is not None and self.window < self.fields["max_positions"]
        return self.window if short else None

    def within_window(self, longest: int, *, limited: bool) -> dict[str, Any]:
        """The fields, if no sequence outgrows the window: then it masks nothing that the causal mask leaves.

        `longest` is the longest sequence trained on or allowed by `model.max_positions`; `limited` says that the
        recipe gives the latter, which otherwise is the config's.
        """
        reach = longest if limited else max(longest, self.fields["max_positions"])
        if self.window is not None and self.window < reach:
            raise RecipeError(
                f"{self.asked_by}: {self.path}: sliding_window = {self.window} is not built, and sequences reach "
                f"{reach}",
                f"model.max_positions = {self.window} (and no longer train.sequence_length) stays inside the window",
            )
        return dict(self.fields)


class _Config:
    """Typed look-ups in a config, with errors that name the file and the key."""

    def __init__(self, path: Path, content: Mapping[str, Any], asked_by: str) -> None:
        self.path, self.content, self.asked_by = path, content, asked_by

    def get(self, key: str, kind: type, default: Any = _ABSENT) -> Any:
        """The value of a key; null and absent mean `default`, and without one the key is required."""
        value = self.content.get(key)
        if value is None:
            if default is _ABSENT:
                raise self.refusal(f'"{key}" is missing', "it must hold the model's own config.json")
            return default
        accepted = (int, float) if kind is float else (kind,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise self.refusal(f'"{key}": {show(value)} is not of type {kind.__name__}', "mend the file")
        return kind(value)

    def refuse_unless(self, key: str, works: tuple[Any, ...]) -> None:
        """Refuses an option whose other values change the mathematics; null and absent are fine."""
        value = self.content.get(key)
        if value is not None and value not in works:
            raise self.refusal(f"{key} = {show(value)} is not built", f"what works: {', '.join(map(show, works))}")

    def refusal(self, problem: str, way_out: str) -> RecipeError:
        """A RecipeError about this file."""
        return RecipeError(f"{self.asked_by}: {self.path}: {problem}", way_out)


def read_config(path: str | Path, asked_by: str = "model.config") -> ConfigFields:
    """The config at `path`, a config.json or the directory that holds it; `asked_by` is the field that names it.

    Raises RecipeError.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    config = _Config(file, _load(file, asked_by), asked_by)
    family = config.get("model_type", str)
    if family not in FAMILIES:
        near = nearest(family, FAMILIES)
        hint = f" (nearest: {near})" if near else ""
        raise config.refusal(f'model_type "{family}" is not built', f"what works: {', '.join(FAMILIES)}{hint}")
    fields = _gpt2(config) if family == "gpt2" else _llama_like(config, family)
    fields["init_std"] = config.get("initializer_range", float, 0.02)
    rates = {key: config.get(key, float, 0.0) for key in _DROPOUTS}
    notes = tuple(f"{key} = {rate:g} in {file}: trained without dropout" for key, rate in rates.items() if rate)
    return ConfigFields(file, fields, _window(config, family), notes, asked_by)


def _load(file: Path, asked_by: str) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"{asked_by}: {file}: cannot be read: {error.strerror}",
            "give the path of a config.json or of the directory that holds it",
        ) from None
    except (ValueError, RecursionError):
        raise RecipeError(f"{asked_by}: {file}: not JSON", "give the path of a model's config.json") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{asked_by}: {file}: not a JSON object", "give the path of a model's config.json")
    return content


def _llama_like(config: _Config, family: str) -> dict[str, Any]:
    """Llama, Mistral, Qwen 2 and Qwen 3: RMSNorm, rotary positions, SwiGLU, grouped-query attention."""
    config.refuse_unless("hidden_act", ("silu", "swish"))
    config.refuse_unless("partial_rotary_factor", (1.0,))
    hidden, heads = config.get("hidden_size", int), config.get("num_attention_heads", int)
    head_dim = config.get("head_dim", int, 128 if family == "qwen3" else None)
    rope = config.get("rope_parameters", dict, {})
    theta = rope.get("rope_theta") or config.get("rope_theta", float, 10000.0)
    fields: dict[str, Any] = {
        "layers": config.get("num_hidden_layers", int),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads", int, 8 if family == "mistral" else heads),
        "ffn": config.get("intermediate_size", int),
        "vocab": config.get("vocab_size", int),
        "tied_embeddings": config.get("tie_word_embeddings", bool, False),
        "norm_eps": config.get("rms_norm_eps", float, 1e-6),
        "rope_theta": float(theta),
        "max_positions": config.get("max_position_embeddings", int),
        "qkv_bias": family == "qwen2",
        "bias": _bias(config, family),
        "qk_norm": family == "qwen3",
    }
    if head_dim is not None and head_dim * heads != hidden:
        fields["head_dim"] = head_dim
    scaling = _rope_scaling(config, rope or config.get("rope_scaling", dict, {}))
    return fields | ({"rope_scaling": scaling} if scaling else {})


def _bias(config: _Config, family: str) -> bool:
    """Llama has biases in all linears or in none here; Qwen 2's and Mistral's are fixed."""
    if family == "qwen2":
        return False
    if family != "llama":
        config.refuse_unless("attention_bias", (False,))
        return False
    attention, mlp = config.get("attention_bias", bool, False), config.get("mlp_bias", bool, False)
    if attention != mlp:
        raise config.refusal(
            f"attention_bias = {show(attention)} with mlp_bias = {show(mlp)} is not built", "what works: both alike"
        )
    return attention


def _rope_scaling(config: _Config, rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """The Llama 3 scaling of rotary frequencies, or None for the plain ones."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise config.refusal(f'rope type "{kind}" is not built', 'what works: "default" and "llama3"')
    names = {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_positions": "original_max_position_embeddings",
    }
    missing = [key for key in names.values() if key not in rope]
    if missing:
        raise config.refusal(f'rope scaling "llama3" lacks "{missing[0]}"', "it must hold the model's own config.json")
    return {field: rope[key] for field, key in names.items()}


def _window(config: _Config, family: str) -> int | None:
    """How far attention looks back where a layer slides, or None where every layer sees all."""
    layer_types = config.get("layer_types", list, [])
    if family == "mistral":
        sliding = config.content.get("sliding_window", 4096) is not None
    elif family in ("qwen2", "qwen3"):
        sliding = config.get("use_sliding_window", bool, False)
    else:
        sliding = False
    sliding = sliding if not layer_types else "sliding_attention" in layer_types
    return config.get("sliding_window", int, 4096) if sliding else None


def _gpt2(config: _Config) -> dict[str, Any]:
    """GPT-2: LayerNorm, learned positions, GELU with tanh, a bias in every linear."""
    config.refuse_unless("activation_function", ("gelu_new", "gelu_pytorch_tanh"))
    config.refuse_unless("scale_attn_weights", (True,))
    config.refuse_unless("scale_attn_by_inverse_layer_idx", (False,))
    config.refuse_unless("add_cross_attention", (False,))
    hidden = config.get("n_embd", int)
    return {
        "layers": config.get("n_layer", int),
        "hidden": hidden,
        "heads": config.get("n_head", int),
        "ffn": config.get("n_inner", int, 4 * hidden),
        "vocab": config.get("vocab_size", int),
        "tied_embeddings": config.get("tie_word_embeddings", bool, True),
        "norm": "layernorm",
        "norm_eps": config.get("layer_norm_epsilon", float, 1e-5),
        "activation": "gelu",
        "positions": "learned",
        "max_positions": config.get("n_positions", int),
        "bias": True,
    }
