"""FLOPs of a model's parts."""

from __future__ import annotations

import pytest

from shardwright.cost.compute import model_cost, total
from shardwright.schedule.action import StageCost
from shardwright.spec.architecture import Architecture, resolve_architecture
from shardwright.spec.model import ModelSpec


def architecture(**fields) -> Architecture:
    return resolve_architecture(ModelSpec(**fields), sequence_length=512, tokenizer_vocab=257)


def test_a_layer_by_hand() -> None:
    a = architecture(layers=1, hidden=8, heads=2, kv_heads=1, ffn=16, vocab=300)
    matrices = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16  # q and output; k and v; gate, up and down
    assert a.layer_matrix_parameters == matrices
    attention = 2 * 2 * (512 / 2) * 2 * 4
    layer = model_cost(a, 512, tokens=3).layer
    assert layer.forward == 3 * (2 * matrices + attention)
    assert layer.input == 3 * (2 * matrices + 2 * attention)
    assert layer.weight == 3 * 2 * matrices


def test_the_head_does_everything_in_its_forward() -> None:
    cost = model_cost(architecture(preset="small-25m"), 512, tokens=2)
    assert cost.head == StageCost(forward=2 * 6 * 512 * 8192, input=0, weight=0)
    assert cost.in_layers(cost.head) == pytest.approx(1.8, abs=0.05)


def test_the_embedding_is_small_and_not_nothing() -> None:
    for preset in ("small-5m", "small-25m", "gpt2", "llama-3.1-8b", "gpt-1t"):
        cost = model_cost(architecture(preset=preset), 512, tokens=1)
        assert 0 < cost.in_layers(cost.embedding) < 0.05


def test_a_tied_matrix_costs_what_an_untied_one_does() -> None:
    tied, untied = (architecture(preset="small-25m", tied_embeddings=tied) for tied in (True, False))
    assert model_cost(tied, 512, 1) == model_cost(untied, 512, 1)


def test_stages_add_up_to_the_model() -> None:
    a = architecture(preset="small-25m")
    cost = model_cost(a, 512, tokens=512)
    whole, *none = cost.stages([8])
    assert none == []
    parts = cost.stages([5, 2, 1])
    assert sum(total(part) for part in parts) == pytest.approx(total(whole))
    assert parts[0].forward == 5 * cost.layer.forward + cost.embedding.forward
    assert parts[1].input == 2 * cost.layer.input
    assert parts[2].forward == cost.layer.forward + cost.head.forward
    assert parts[2].weight == cost.layer.weight


def test_it_differs_from_the_convention_of_mfu_by_half_of_the_attention() -> None:
    a = architecture(preset="small-25m")
    (whole,) = model_cost(a, 512, tokens=1).stages([a.layers])
    halved = 6 * a.layers * a.heads * a.head_dim * 512
    embedding = total(model_cost(a, 512, tokens=1).embedding)
    assert total(whole) - embedding == pytest.approx(a.flops_per_token(512) - halved)
