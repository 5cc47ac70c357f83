"""Optimizers over owned ranges against torch's own over whole tensors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from shardwright.layout.chunk import GRAIN
from shardwright.optim import optimizers
from shardwright.optim.optimizers import SGD, AdamW, make_optimizer
from shardwright.optim.owned import OwnedTensor
from shardwright.spec.train import TrainSpec

STEPS, LENGTH = 5, 37
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def spec(optimizer: str, **fields: float) -> TrainSpec:
    other = {"betas": (0.8, 0.97), "eps": 1e-3, "momentum": 0.8}  # not the defaults
    return TrainSpec(optimizer=optimizer, weight_decay=0.1, **other | fields)  # pyright: ignore[reportArgumentType]


def torchs(kind: str, matrix: Tensor, vector: Tensor) -> torch.optim.Optimizer:
    groups = [{"params": [matrix], "weight_decay": 0.1}, {"params": [vector], "weight_decay": 0.0}]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=0.8)
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.97), eps=1e-3)


def random(step: int) -> Tensor:
    return torch.randn(LENGTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decayed", [0, 20, LENGTH])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_updates_are_torchs(kind: str, dtype: torch.dtype, decayed: int, scale: float) -> None:
    """The first `decayed` elements are a matrix and take weight decay; the rest do not; rates change every step."""
    start = random(100).to(dtype)
    owned = OwnedTensor("unit", start.clone(), torch.zeros(LENGTH, dtype=dtype), decayed)
    ours = make_optimizer(spec(kind), [owned])
    matrix, vector = (nn.Parameter(part.clone()) for part in (start[:decayed], start[decayed:]))
    theirs = torchs(kind, matrix, vector)
    for step in range(STEPS):
        gradient, lr = random(step).to(dtype), 0.1 / (step + 1)
        owned.gradient.copy_(gradient)
        ours.update(owned, lr, scale)
        matrix.grad, vector.grad = (part.clone() * scale for part in (gradient[:decayed], gradient[decayed:]))
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
        expected = torch.cat([matrix.detach(), vector.detach()])
        torch.testing.assert_close(owned.values, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_shares_update_as_the_whole_does(kind: str) -> None:
    whole = OwnedTensor("unit", random(0), random(1), 20)
    edges = [0, 9, 20, 21, 30, LENGTH]
    shares = [
        OwnedTensor("unit", random(0)[a:b].clone(), random(1)[a:b].clone(), min(max(20 - a, 0), b - a))
        for a, b in pairwise(edges)
    ]
    for owned in (whole, *shares):
        optimizer = make_optimizer(spec(kind), [owned])
        gradient = owned.gradient.clone()
        for _ in range(3):
            owned.gradient.copy_(gradient)
            optimizer.update(owned, 0.1, 0.5)
    torch.testing.assert_close(torch.cat([share.values for share in shares]), whole.values, rtol=1e-14, atol=1e-14)


def test_masters_take_narrower_gradients() -> None:
    gradient = random(1).bfloat16()
    for scale in (1.0, 0.3):
        narrow = OwnedTensor("unit", random(0).float(), gradient.clone(), 20)
        wide = OwnedTensor("unit", random(0).float(), gradient.float(), 20)
        for owned in (narrow, wide):
            make_optimizer(spec("adamw"), [owned]).update(owned, 0.1, scale)
        assert torch.equal(narrow.values, wide.values)
        assert torch.equal(narrow.gradient, gradient)


def test_state_is_named_flat_and_counts_updates_once() -> None:
    owned = OwnedTensor("unit", random(0), random(1), 20)
    adamw = make_optimizer(spec("adamw"), [owned])
    assert isinstance(adamw, AdamW) and (adamw.betas, adamw.eps, adamw.weight_decay) == ((0.8, 0.97), 1e-3, 0.1)
    for updates in range(3):
        state = adamw.state("unit")
        assert set(state) == {"exp_avg", "exp_avg_sq", "step"} and float(state["step"]) == updates
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (LENGTH,)
        assert state["exp_avg"].dtype == owned.values.dtype
        adamw.update(owned, 0.1, 1.0)
    sgd = make_optimizer(spec("sgd", momentum=0.5), [owned])
    assert isinstance(sgd, SGD) and (sgd.momentum, sgd.weight_decay) == (0.5, 0.1)
    assert set(sgd.state("unit")) == {"momentum"} and not sgd.state("unit")["momentum"].any()


def test_each_owned_tensor_has_state_of_its_own() -> None:
    pair = [OwnedTensor(name, random(0), random(1), 0) for name in ("a", "b")]
    optimizer = make_optimizer(spec("adamw"), pair)
    optimizer.update(pair[0], 0.1, 1.0)
    assert float(optimizer.state("a")["step"]) == 1 and float(optimizer.state("b")["step"]) == 0
    assert torch.equal(pair[1].values, random(0))


@pytest.mark.parametrize(
    ("decayed", "parts"),
    [(0, [(0, 37, False)]), (37, [(0, 37, True)]), (5, [(0, 5, True), (5, 37, False)])],
)
def test_parts(decayed: int, parts: list[tuple[int, int, bool]]) -> None:
    owned = OwnedTensor("unit", random(0), random(1), decayed)
    assert [(part.start, part.stop, decays) for part, decays in owned.parts()] == parts


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
def test_windows_change_no_bit(monkeypatch: pytest.MonkeyPatch, kind: str, narrow: torch.dtype) -> None:
    """What is updated piece by piece while it is in the caches is what one call would make, its narrow copy too."""
    generator = torch.Generator().manual_seed(3)
    start, gradients = torch.randn(1500, generator=generator), torch.randn(3, 1500, generator=generator).to(narrow)
    found = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for elements in (1 << 20, GRAIN):
        monkeypatch.setattr(optimizers, "CACHED_ELEMENTS", elements)
        owned = OwnedTensor("unit", start.clone(), torch.zeros(1500, dtype=narrow), 700)
        assert elements > 1500 or len(owned.windows(elements)) > 20
        optimizer, values = make_optimizer(spec(kind), [owned]), torch.zeros(1500, dtype=torch.bfloat16)
        for gradient in gradients:
            owned.gradient.copy_(gradient)
            optimizer.update(owned, 0.1, 0.3, values)
        assert torch.equal(values, owned.values.bfloat16()) and not torch.equal(owned.values, start)
        found.append([owned.values, *optimizer.moments("unit")])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
