"""Where each Hugging Face family keeps our tensors: names, transpositions and places in fused tensors, as data.

Our tensors are stored as a product applies them, [outputs, inputs], and unfused. Llama, Mistral, Qwen 2 and Qwen 3
store them alike under other names. GPT-2 has `Conv1D` weights, [inputs, outputs], and query, key and value in one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from shardwright.errors import CheckpointError
from shardwright.spec.architecture import Architecture
from shardwright.spec.hf_config import FAMILIES


@dataclass(frozen=True)
class Stored:
    """One of our tensors, `ours` of `our_shape`, as a family stores it: in its tensor `name`, which has `shape`.

    It begins at `begin` along the stored tensor's last dimension, and lies there transposed or as it is.
    """

    ours: str
    our_shape: tuple[int, ...]
    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    begin: int = 0


_PREFIXES = {"gpt2": "transformer."}
_OUTPUT = "lm_head.weight"
_BUFFERS = re.compile(r"(^|\.)(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")


def prefix_of(family: str) -> str:
    """What the names of all but the head begin with; files of a model without its head leave it out."""
    return _PREFIXES.get(family, "model.")


def is_buffer(name: str) -> bool:
    """Whether a stored tensor is a mask or a table that older files hold and that is computed here."""
    return _BUFFERS.search(name) is not None


def is_repeated(name: str, architecture: Architecture) -> bool:
    """Whether a stored tensor is the output matrix of tied embeddings once more, which some files hold."""
    return architecture.tied_embeddings and name == _OUTPUT


def family_of(architecture: Architecture) -> str:
    """The family that an architecture is exported as when none is remembered. Raises CheckpointError."""
    a = architecture
    if a.norm == "layernorm" or a.positions == "learned":
        family = "gpt2"
    elif a.qk_norm:
        family = "qwen3"
    elif a.qkv_bias and not a.bias:
        family = "qwen2"
    else:
        # Llama's own code wants heads that divide the hidden size. Mistral's is the same without that wish.
        family = "llama" if a.bias or a.hidden % a.heads == 0 else "mistral"
    check_family(a, family)
    return family


def check_family(architecture: Architecture, family: str) -> None:
    """Raises CheckpointError where a family's code cannot compute what an architecture says, naming the field."""
    if family not in FAMILIES:
        raise CheckpointError(f'the family "{family}" is not known', f"what works: {', '.join(FAMILIES)}")
    for field, value, wanted in _demands(architecture, family):
        if value != wanted:
            raise CheckpointError(
                f"model.{field}: {_show(value)} has no form in the Hugging Face family {family}, "
                f"which has {field} = {_show(wanted)}",
                f"what works: {field} = {_show(wanted)}, or a checkpoint of Shardwright's own, which holds any model",
            )


def _show(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def _demands(architecture: Architecture, family: str) -> Iterator[tuple[str, object, object]]:
    """(field, its value, the only one that a family has)."""
    a = architecture
    if family == "gpt2":
        yield from (("norm", a.norm, "layernorm"), ("positions", a.positions, "learned"))
        yield from (("activation", a.activation, "gelu"), ("bias", a.bias, True), ("qk_norm", a.qk_norm, False))
        yield from (("kv_heads", a.kv_heads, a.heads), ("head_dim", a.head_dim, a.hidden // a.heads))
        yield ("hidden", a.hidden, a.hidden // a.heads * a.heads)
        return
    yield from (
        ("norm", a.norm, "rmsnorm"),
        ("positions", a.positions, "rotary"),
        ("activation", a.activation, "swiglu"),
    )
    yield ("qk_norm", a.qk_norm, family == "qwen3")
    if family == "llama":
        yield ("qkv_bias", a.qkv_bias or a.bias, a.bias)
        yield ("hidden", a.hidden, a.hidden // a.heads * a.heads)
        return
    yield from (("bias", a.bias, False), ("qkv_bias", a.qkv_bias, family == "qwen2"))


def stored_tensors(architecture: Architecture, family: str) -> list[Stored]:
    """Each of our tensors as a family stores it, in the order of the model; those of one stored tensor are neighbours.

    Raises CheckpointError.
    """
    check_family(architecture, family)
    a, layer = architecture, _gpt2_layer if family == "gpt2" else _llama_layer
    ends = _GPT2_ENDS if family == "gpt2" else _LLAMA_ENDS
    prefix = prefix_of(family)
    found = [_same("embedding.tokens.weight", prefix + ends[0], a.vocab, a.hidden)]
    if a.positions == "learned":
        found.append(_same("embedding.positions.weight", prefix + "wpe.weight", a.max_positions, a.hidden))
    for index in range(a.layers):
        found += layer(a, f"layers.{index}.", f"{prefix}{ends[1]}.{index}.")
    found += _norm(a, "head.norm", prefix + ends[2])
    if not a.tied_embeddings:
        found.append(_same("head.output.weight", _OUTPUT, a.vocab, a.hidden))
    return found


_LLAMA_ENDS = ("embed_tokens.weight", "layers", "norm")
_GPT2_ENDS = ("wte.weight", "h", "ln_f")


def _same(ours: str, name: str, *shape: int) -> Stored:
    return Stored(ours, shape, name, shape)


def _norm(a: Architecture, ours: str, theirs: str) -> Iterator[Stored]:
    for what in ("weight", "bias") if a.norm == "layernorm" else ("weight",):
        yield _same(f"{ours}.{what}", f"{theirs}.{what}", a.hidden)


def _linears(a: Architecture) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of a layer's products."""
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    attention = {name: (rows, a.hidden) for name, rows in (("q", q), ("k", kv), ("v", kv))}
    ups = {name: (a.ffn, a.hidden) for name in (("gate", "up") if a.activation == "swiglu" else ("up",))}
    return {
        **{f"attention.{name}": shape for name, shape in attention.items()},
        "attention.out": (a.hidden, q),
        **{f"mlp.{name}": shape for name, shape in ups.items()},
        "mlp.down": (a.hidden, a.ffn),
    }


_LLAMA_LINEARS = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def _llama_layer(a: Architecture, ours: str, theirs: str) -> Iterator[Stored]:
    biased = set(_LLAMA_LINEARS) if a.bias else set()
    biased |= {"attention.q", "attention.k", "attention.v"} if a.qkv_bias else set()
    yield from _norm(a, f"{ours}attention_norm", f"{theirs}input_layernorm")
    yield from _norm(a, f"{ours}mlp_norm", f"{theirs}post_attention_layernorm")
    for linear, (outputs, inputs) in _linears(a).items():
        name = theirs + _LLAMA_LINEARS[linear]
        yield _same(f"{ours}{linear}.weight", f"{name}.weight", outputs, inputs)
        if linear in biased:
            yield _same(f"{ours}{linear}.bias", f"{name}.bias", outputs)
    for kind in ("q_norm", "k_norm") if a.qk_norm else ():
        yield _same(f"{ours}attention.{kind}.weight", f"{theirs}self_attn.{kind}.weight", a.head_dim)


_GPT2_LINEARS = {
    "attn.c_attn": ("attention.q", "attention.k", "attention.v"),
    "attn.c_proj": ("attention.out",),
    "mlp.c_fc": ("mlp.up",),
    "mlp.c_proj": ("mlp.down",),
}


def _gpt2_layer(a: Architecture, ours: str, theirs: str) -> Iterator[Stored]:
    yield from _norm(a, f"{ours}attention_norm", f"{theirs}ln_1")
    yield from _norm(a, f"{ours}mlp_norm", f"{theirs}ln_2")
    linears = _linears(a)
    for fused, parts in _GPT2_LINEARS.items():
        inputs, total = linears[parts[0]][1], sum(linears[part][0] for part in parts)
        begins = [sum(linears[part][0] for part in parts[:i]) for i in range(len(parts))]
        for part, begin in zip(parts, begins, strict=True):
            shapes = (linears[part], (inputs, total))
            yield Stored(f"{ours}{part}.weight", shapes[0], f"{theirs}{fused}.weight", shapes[1], True, begin)
        for part, begin in zip(parts, begins, strict=True):
            yield Stored(f"{ours}{part}.bias", linears[part][:1], f"{theirs}{fused}.bias", (total,), False, begin)
