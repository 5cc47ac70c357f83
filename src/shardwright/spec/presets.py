"""Published models by name, as fields of `[model]`, and small ones for CPUs.

Sources: GPT-2's and the Llama 3, Qwen 3 releases' config.json files; Megatron-Turing NLG 530B (arXiv 2201.11990,
section 3); the 1T GPT of Narayanan et al., SC21 (arXiv 2104.04473, table 1). What a preset leaves out takes the
default of the field, so a change of `hidden` also moves `head_dim` and `ffn` where these follow from it.
"""

from __future__ import annotations

from typing import Any

_GPT2: dict[str, Any] = {
    "vocab": 50257,
    "tied_embeddings": True,
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "activation": "gelu",
    "positions": "learned",
    "max_positions": 1024,
    "bias": True,
}
_MEGATRON = _GPT2 | {"vocab": 51200, "max_positions": 2048}
_LLAMA3: dict[str, Any] = {
    "vocab": 128256,
    "kv_heads": 8,
    "rope_theta": 500000.0,
    "rope_scaling": {"factor": 8.0, "original_max_positions": 8192},
    "max_positions": 131072,
}
_QWEN3: dict[str, Any] = {
    "vocab": 151936,
    "kv_heads": 8,
    "head_dim": 128,
    "norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_positions": 40960,
    "qk_norm": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2 | {"layers": 12, "hidden": 768, "heads": 12},
    "gpt2-medium": _GPT2 | {"layers": 24, "hidden": 1024, "heads": 16},
    "gpt2-large": _GPT2 | {"layers": 36, "hidden": 1280, "heads": 20},
    "gpt2-xl": _GPT2 | {"layers": 48, "hidden": 1600, "heads": 25},
    "llama-3.2-1b": _LLAMA3
    | {"layers": 16, "hidden": 2048, "heads": 32, "ffn": 8192, "tied_embeddings": True}
    | {"rope_scaling": {"factor": 32.0, "original_max_positions": 8192}},
    "llama-3.1-8b": _LLAMA3 | {"layers": 32, "hidden": 4096, "heads": 32, "ffn": 14336},
    "llama-3.1-70b": _LLAMA3 | {"layers": 80, "hidden": 8192, "heads": 64, "ffn": 28672},
    "llama-3.1-405b": _LLAMA3 | {"layers": 126, "hidden": 16384, "heads": 128, "ffn": 53248},
    "qwen3-0.6b": _QWEN3 | {"layers": 28, "hidden": 1024, "heads": 16, "ffn": 3072, "tied_embeddings": True},
    "qwen3-8b": _QWEN3 | {"layers": 36, "hidden": 4096, "heads": 32, "ffn": 12288},
    "megatron-turing-530b": _MEGATRON | {"layers": 105, "hidden": 20480, "heads": 128},
    "gpt-1t": _MEGATRON | {"layers": 128, "hidden": 25600, "heads": 160},
    "tiny": {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 128},
    "small-5m": {"layers": 6, "hidden": 256, "heads": 8, "kv_heads": 4, "ffn": 704},
    "small-25m": {"layers": 8, "hidden": 512, "heads": 8, "ffn": 680, "vocab": 8192},
    "small-100m": {"layers": 14, "hidden": 768, "heads": 12, "kv_heads": 4, "ffn": 2048, "vocab": 8192},
}
