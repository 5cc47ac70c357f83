"""The decoder against the same model written out by hand over its named tensors, and its names and sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shardwright.data.batch import IGNORED
from shardwright.nn.attention import rotary_frequencies
from shardwright.nn.decoder import Decoder
from shardwright.nn.initial import fill
from shardwright.nn.parameters import pieces_of
from shardwright.spec.architecture import Architecture, resolve_architecture
from shardwright.spec.model import ModelSpec

SMALL = {"layers": 2, "hidden": 12, "heads": 4, "head_dim": 6, "ffn": 10, "vocab": 19, "init_std": 0.3}
GPT2 = {"norm": "layernorm", "activation": "gelu", "positions": "learned", "bias": True, "tied_embeddings": True}
SCALED = {"rope_theta": 50.0, "rope_scaling": {"factor": 8.0, "original_max_positions": 64}}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"kv_heads": 2},
    "one-kv-head": {"kv_heads": 1, "qkv_bias": True},
    "gpt2": GPT2,
    "gpt2-untied-rotary": GPT2 | {"tied_embeddings": False, "positions": "rotary"},
    "qwen": {"kv_heads": 2, "qk_norm": True, "qkv_bias": True, "norm_eps": 1e-3},
    "llama": {"kv_heads": 2, "tied_embeddings": True} | SCALED,
    "swiglu-bias": {"bias": True},
}


def architecture(**fields: Any) -> Architecture:
    return resolve_architecture(ModelSpec(**SMALL | fields), sequence_length=9, tokenizer_vocab=None)


def decoder(a: Architecture, seed: int = 0) -> tuple[Decoder, dict[str, Tensor]]:
    """A model in fp64 with values everywhere, biases and norms too, and its tensors by their global names."""
    model = Decoder(a).double()
    tensors = {}
    with torch.no_grad():
        for parameter, pieces in pieces_of(model).items():
            for piece in pieces:
                part = parameter.detach().view(-1)[piece.start : piece.stop]
                fill(part, piece.box, seed)
                if len(piece.box.tensor.shape) == 1:
                    part += 0.1 * torch.arange(part.numel()).remainder(5) + 0.03 * len(tensors)  # no two alike
                tensors[piece.box.name] = part.view(piece.box.size)
    return model, tensors


# The model again, one position and one head at a time where that is clearer


def norm(a: Architecture, w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    if a.norm == "layernorm":
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + a.norm_eps).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]
    return x / (x.square().mean(-1, keepdim=True) + a.norm_eps).sqrt() * w[f"{name}.weight"]


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))


def frequencies(a: Architecture) -> list[float]:
    """Llama 3.1's `apply_scaling`, as it was released: by cases."""
    found = []
    for i in range(a.head_dim // 2):
        frequency = 1.0 / a.rope_theta ** (2 * i / a.head_dim)
        scaling = a.rope_scaling
        if scaling is not None:
            low = scaling.original_max_positions / scaling.low_freq_factor
            high = scaling.original_max_positions / scaling.high_freq_factor
            wavelength = 2 * math.pi / frequency
            if wavelength > low:
                frequency /= scaling.factor
            elif wavelength >= high:
                smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        found.append(frequency)
    return found


def rotate(a: Architecture, x_TD: Tensor) -> Tensor:
    """Pairs (i, i + D/2) as complex numbers, turned."""
    if a.positions != "rotary":
        return x_TD
    half = a.head_dim // 2
    pairs = torch.complex(x_TD[:, :half], x_TD[:, half:])
    angles = torch.outer(
        torch.arange(len(x_TD), dtype=torch.float64), torch.tensor(frequencies(a), dtype=torch.float64)
    )
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=1)


def attention(a: Architecture, w: dict[str, Tensor], name: str, x_TC: Tensor) -> Tensor:
    q, k, v = (linear(w, f"{name}.{part}", x_TC) for part in "qkv")
    outputs = []
    for head in range(a.heads):
        own, shared = (slice(h * a.head_dim, (h + 1) * a.head_dim) for h in (head, head * a.kv_heads // a.heads))
        query, key = q[:, own], k[:, shared]
        if a.qk_norm:
            query, key = (
                t / (t.square().mean(-1, keepdim=True) + a.norm_eps).sqrt() * w[f"{name}.{n}.weight"]
                for t, n in ((query, "q_norm"), (key, "k_norm"))
            )
        scores = rotate(a, query) @ rotate(a, key).T / math.sqrt(a.head_dim)
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        outputs.append(scores.softmax(-1) @ v[:, shared])
    return linear(w, f"{name}.out", torch.cat(outputs, dim=1))


def mlp(a: Architecture, w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    up = linear(w, f"{name}.up", x)
    if a.activation == "swiglu":
        gate = linear(w, f"{name}.gate", x)
        return linear(w, f"{name}.down", gate * gate.sigmoid() * up)
    inner = math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)
    return linear(w, f"{name}.down", up * (1 + inner.tanh()) / 2)


def by_hand(a: Architecture, w: dict[str, Tensor], tokens_T: Tensor) -> Tensor:
    """Logits [T, vocab] of one sequence."""
    x = w["embedding.tokens.weight"][tokens_T]
    if a.positions == "learned":
        x = x + w["embedding.positions.weight"][: len(tokens_T)]
    for layer in range(a.layers):
        name = f"layers.{layer}"
        x = x + attention(a, w, f"{name}.attention", norm(a, w, f"{name}.attention_norm", x))
        x = x + mlp(a, w, f"{name}.mlp", norm(a, w, f"{name}.mlp_norm", x))
    head = "embedding.tokens.weight" if a.tied_embeddings else "head.output.weight"
    return norm(a, w, "head.norm", x) @ w[head].T


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(19, (3, 9), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_loss_are_those_written_by_hand(variant: str) -> None:
    a = architecture(**VARIANTS[variant])
    model, w = decoder(a)
    batch, targets = tokens(), tokens(2)
    targets[0, :4] = IGNORED
    logits = model.logits(batch)
    expected = torch.stack([by_hand(a, w, row) for row in batch])
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)
    assert float(logits.detach().std()) > 0.1
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(model(batch, targets), loss, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("position", [1, 4, 8])
def test_a_token_changes_nothing_before_it_and_nothing_beside_it(variant: str, position: int) -> None:
    model, _ = decoder(architecture(**VARIANTS[variant]))
    batch = tokens()
    changed = batch.clone()
    changed[1, position] = (changed[1, position] + 1) % 19
    before, after = model.logits(batch), model.logits(changed)
    torch.testing.assert_close(after[1, :position], before[1, :position], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=1e-12, atol=1e-12)
    assert all(not torch.allclose(after[1, t], before[1, t]) for t in range(position, 9))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_are_repeated_heads(kv_heads: int) -> None:
    grouped, w = decoder(architecture(kv_heads=kv_heads, qkv_bias=True))
    full, repeated = decoder(architecture(kv_heads=4, qkv_bias=True), seed=5)
    with torch.no_grad():
        for name, tensor in repeated.items():
            source = w[name]
            if source.shape != tensor.shape:
                heads = source.view(kv_heads, 6, *source.shape[1:]).repeat_interleave(4 // kv_heads, dim=0)
                source = heads.reshape(tensor.shape)
            tensor.copy_(source)
    torch.testing.assert_close(full.logits(tokens()), grouped.logits(tokens()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("factor", "original"), [(None, 0), (8.0, 8192), (32.0, 64)])
def test_rotary_frequencies_are_llamas_by_cases(factor: float | None, original: int) -> None:
    scaling = None if factor is None else {"factor": factor, "original_max_positions": original}
    a = architecture(head_dim=128, rope_theta=500000.0, rope_scaling=scaling)
    found = rotary_frequencies(a)
    torch.testing.assert_close(found, torch.tensor(frequencies(a), dtype=torch.float64), rtol=1e-12, atol=0)
    assert float(found[0]) == 1.0
    assert float(found[-1]) == pytest.approx(500000.0 ** (-126 / 128) / (factor or 1.0))


def test_scores_depend_on_distances_alone() -> None:
    """What rotary positions are for: the same tokens further on attend to each other as before."""
    a = architecture(**SCALED)
    x = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotated = [rotate(a, row.expand(9, 6)) for row in x]
    scores = rotated[0] @ rotated[1].T
    for distance in range(8):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_cover_every_element_once(variant: str) -> None:
    a = architecture(**VARIANTS[variant])
    with torch.device("meta"):
        model = Decoder(a)
    held = pieces_of(model)
    assert set(held) == set(model.parameters())
    names = [piece.box.name for pieces in held.values() for piece in pieces]
    assert len(names) == len(set(names))
    for parameter, pieces in held.items():
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces)][:-1]
        assert pieces[-1].stop == parameter.numel()
        assert all(piece.box.size == piece.box.tensor.shape for piece in pieces)
    assert sum(parameter.numel() for parameter in held) == a.num_parameters
    assert not any(".qkv." in name or ".gate_up." in name for name in names)  # storage is fused, names are not


def test_what_starts_how() -> None:
    a = architecture(bias=True, norm="layernorm", qk_norm=True)
    with torch.device("meta"):
        held = pieces_of(Decoder(a))
    tensors = {piece.box.name: piece.box.tensor for pieces in held.values() for piece in pieces}
    for name, tensor in tensors.items():
        kind = "zeros" if name.endswith("bias") else "ones" if "norm" in name else "normal"
        assert tensor.fill == kind, name
        feeds_residual = name.endswith((".out.weight", ".down.weight"))
        if kind == "normal":
            assert tensor.std == pytest.approx(0.3 / (math.sqrt(2 * a.layers) if feeds_residual else 1)), name


def test_every_block_takes_what_the_one_before_gives() -> None:
    model, _ = decoder(architecture(tied_embeddings=True))
    embedding, *layers, head = model.blocks()
    x = embedding(tokens())
    for layer in layers:
        x = layer(x)
    assert torch.equal(head(x, tokens(2)), model(tokens(), tokens(2)))
    assert {p for block in model.blocks() for p in block.parameters()} == set(model.parameters())
