"""The tapes of blocks: a backward takes back what its forward kept, whatever the block and the setting."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from shardwright.cost import activations
from shardwright.cost.activations import EmbeddingTape, HeadTape, LayerTape
from shardwright.cost.shapes import Shapes
from shardwright.cost.tape import Tape
from shardwright.spec.architecture import resolve_architecture
from shardwright.spec.model import ModelSpec

FIELDS = {"layers": 2, "hidden": 24, "heads": 12, "head_dim": 4, "ffn": 27, "vocab": 509}
FAMILIES = {
    "llama": FIELDS | {"kv_heads": 3},
    "qwen": FIELDS | {"kv_heads": 3, "qk_norm": True, "qkv_bias": True},
    "gpt2": FIELDS | {"norm": "layernorm", "activation": "gelu", "positions": "learned", "bias": True},
}


def shapes(family: str, **fields: object) -> Shapes:
    a = resolve_architecture(
        ModelSpec(**FAMILIES[family]), sequence_length=13, tokenizer_vocab=None, expected_vocab=None
    )
    own = Shapes(a, 13, 2, 1, 0, True, "fp32", "fp32", "cpu")
    return replace(own, **fields)


@pytest.mark.parametrize("setting", ["none", "selective", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_leaves_the_gradient_of_its_input_alone(family: str, setting: str) -> None:
    for tp, sharded, dtype, device in product((1, 2, 4), (True, False), ("fp32", "bf16"), ("cpu", "cuda")):
        s = shapes(family, tp=tp, index=tp - 1, sequence_parallel=sharded, dtype=dtype, device=device)
        tape, layer = Tape(), LayerTape(s, setting)
        tape.take(s.hidden)  # the input
        layer.forward(tape)
        assert tape.activations == 2 * s.hidden + layer.kept
        tape.drop(s.hidden)  # the output
        tape.take(s.hidden)  # its gradient
        layer.backward(tape)
        assert tape.activations == s.hidden
        assert tape.transfers == 0


@pytest.mark.parametrize("setting", ["none", "selective", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_take_what_a_deferring_backward_left(family: str, setting: str) -> None:
    for tp, sharded in product((1, 2), (True, False)):
        s = shapes(family, tp=tp, sequence_parallel=sharded)
        tape, layer = Tape(), LayerTape(s, setting)
        tape.take(s.hidden)
        layer.forward(tape)
        layer.backward(tape, defers=True)
        left = tape.activations - s.hidden
        assert left > 0
        layer.weights(tape)
        assert tape.activations == s.hidden


@pytest.mark.parametrize("chunk", [5, 1000])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ends_of_a_model_leave_nothing(monkeypatch: pytest.MonkeyPatch, family: str, chunk: int) -> None:
    monkeypatch.setattr(activations, "chunk_tokens", lambda _vocab, _device: chunk)
    for tp, sharded, dtype, sequences in product((1, 2), (True, False), ("fp32", "bf16"), (2, 4)):
        s = shapes(family, tp=tp, sequence_parallel=sharded, dtype=dtype, sequences=sequences)
        tape, embedding, head = Tape(), EmbeddingTape(s, tied=tp == 1), HeadTape(s)
        embedding.forward(tape)
        begin = tape.activations
        tape.take(s.hidden)
        head.forward(tape)
        head.backward(tape)
        assert tape.activations == begin + s.hidden
        tape.drop(s.hidden)  # the layers between have taken it, and give the gradient of their input for that input
        embedding.backward(tape)
        assert tape.activations == 0


def test_settings_keep_less_and_less() -> None:
    for family in FAMILIES:
        none, selective, full = (LayerTape(shapes(family), name).kept for name in ("none", "selective", "full"))
        assert none > selective > full == 0
