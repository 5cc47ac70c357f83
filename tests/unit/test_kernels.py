"""Kernels as they are written, beside the formulas that a compiler gets instead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardwright.nn.attention import RotaryKernels
from shardwright.nn.decoder import Decoder
from shardwright.nn.kernels import Kernels
from shardwright.nn.mlp import GatedKernels
from shardwright.nn.norm import NormKernels
from shardwright.parallel.compiled import compile_kernels
from shardwright.parallel.tensor.vocabulary import LossKernels
from shardwright.spec.architecture import resolve_architecture
from shardwright.spec.model import ModelSpec


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_gated_activation() -> None:
    written, gate_up, grad = GatedKernels(), normal(5, 2, 12), normal(5, 2, 6)
    formulas = written.formulas()
    torch.testing.assert_close(formulas.forward(gate_up), written.forward(gate_up))
    torch.testing.assert_close(formulas.backward(gate_up, grad), written.backward(gate_up, grad))


def test_rms_norm() -> None:
    written, x, weight, grad = NormKernels(), normal(5, 2, 8), normal(8), normal(5, 2, 8)
    formulas = written.formulas()
    y, scale = written.forward(x, weight, 1e-5)
    torch.testing.assert_close(formulas.forward(x, weight, 1e-5), (y, scale))
    expected = written.backward(x, weight, scale, grad)
    torch.testing.assert_close(formulas.backward(x, weight, scale, grad), expected)


@pytest.mark.parametrize("shape", [(5, 2, 24), (5, 2, 4, 6)])
def test_rotation(shape: tuple[int, ...]) -> None:
    written, x, cos, sin = RotaryKernels(), normal(*shape), normal(5, 1, 1, 3), normal(5, 1, 1, 3)
    formulas = written.formulas()
    rotated = formulas.rotate(x, cos, sin, 3, 6)
    torch.testing.assert_close(rotated, written.rotate(x, cos, sin, 3, 6))


def test_loss_of_a_chunk() -> None:
    written, logits, own = LossKernels(), normal(7, 11), torch.tensor([3, -1, 0, 10, -1, 5, -1])
    formulas = written.formulas()
    counted = torch.tensor([True, True, True, True, False, True, False])  # the second has its word on another rank
    kept, numbers = formulas.summarise(logits, own)
    shares, expected = written.summarise(logits.clone(), own)
    torch.testing.assert_close(numbers, expected)
    log_sum = numbers[0] + 0.7  # as with words on another rank
    grad = formulas.gradient(kept, numbers[0], log_sum, own, counted)
    torch.testing.assert_close(grad, written.gradient(shares, numbers[0], log_sum, own, counted))


def test_modules_of_a_kind_share_one_compiled_set() -> None:
    sizes = ModelSpec(layers=2, hidden=16, heads=2, ffn=24, vocab=11)
    with torch.device("meta"):
        model = Decoder(resolve_architecture(sizes, sequence_length=9, tokenizer_vocab=None))
    compile_kernels(model)
    held = [getattr(module, "kernels", None) for module in model.modules()]
    sets = {id(kernels): type(kernels) for kernels in held if isinstance(kernels, Kernels)}
    assert sorted(kind.__name__ for kind in sets.values()) == ["GatedKernels", "NormKernels", "RotaryKernels"]
    assert NormKernels() not in held
