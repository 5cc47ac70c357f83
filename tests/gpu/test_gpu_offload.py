"""Offload with streams, events and pinned memory for real: what a CPU cannot show."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.comm.mesh import Mesh
from shardwright.data.samples import RandomSamples
from shardwright.layout.mesh import Topology
from shardwright.optim.optimizers import make_optimizer
from shardwright.parallel.compose import Runtime, compose
from shardwright.plan.plan import Plan
from shardwright.plan.resolve import resolve
from shardwright.spec.load import build
from shardwright.train.batches import rank_batch
from shardwright.train.step import train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS, LR = 4, 1e-3
# 21 M parameters: large enough for transfers and kernels to be under way when the next are started.
MODEL = {"layers": 6, "hidden": 512, "heads": 8, "ffn": 1408, "vocab": 4099, "tied_embeddings": True}


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same bits for the same work, as far as torch has them."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def plan_of(offload: str, chunk: str = "64 MiB", microbatches: int = 2, **train: Any) -> Plan:
    recipe = {
        "sequence_length": 128,
        "global_batch_size": 2 * microbatches,
        "micro_batch_size": 2,
        "dtype": "bf16",
        "grad_dtype": "bf16",
        "max_grad_norm": 0.05,
    }
    memory = {"offload": offload, "offload_chunk": chunk}
    spec = build({"model": MODEL, "train": recipe | train, "parallel": {"dp": 1, "zero": 3}, "memory": memory})
    return resolve(spec, world_size=1, device="cuda", native_bf16=True, tokenizer_vocab=None)


def composed(plan: Plan) -> tuple[Runtime, Any]:
    runtime = compose(plan, Mesh(Topology(), device()))
    return runtime, make_optimizer(plan.spec.train, runtime.states.owned_tensors())


def state_of(runtime: Runtime, optimizer: Any) -> dict[str, Tensor]:
    """Parameters, masters and moments by name, on the host."""
    found = {}
    for unit in runtime.states.units:
        unit.need()
        found[f"{unit.name} parameters"] = unit.whole.cpu()
        found[f"{unit.name} masters"] = unit.owned_tensor().values.cpu().clone()
        for key, tensor in optimizer.state(unit.name).items():
            found[f"{unit.name} {key}"] = tensor.cpu().clone()
    return found


def trained(plan: Plan) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and state after some steps."""
    runtime, optimizer = composed(plan)
    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, 3, 0.4)
    losses = [train_step(runtime, optimizer, rank_batch(runtime, samples, i), LR).loss for i in range(STEPS)]
    return losses, state_of(runtime, optimizer)


def updated(plan: Plan) -> dict[str, Tensor]:
    """State after some updates from gradients that depend on nothing."""
    runtime, optimizer = composed(plan)
    for step in range(STEPS):
        runtime.states.begin_step(1)
        for number, unit in enumerate(runtime.states.units):
            unit.need()
            generator = torch.Generator(device()).manual_seed(100 * step + number)
            for slot, parameter in enumerate(unit.parameters):
                parameter.grad = torch.randn(parameter.shape, generator=generator, device=device()).to(parameter.dtype)
                unit.accumulate(slot)
        for unit in reversed(runtime.states.units):
            unit.reduce(last=True)
        runtime.states.collect_gradients()
        runtime.states.update(optimizer, LR, 0.5)
    return state_of(runtime, optimizer)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The names under which two states differ."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


CHUNKS = ["64 MiB", "3 MB", "64 KiB"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("grad", ["bf16", "fp32"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_streamed_updates_are_the_devices_to_the_bit(chunk: str, grad: str, optimizer: str) -> None:
    train = {"grad_dtype": grad, "optimizer": optimizer}
    expected = updated(plan_of("none", **train))
    assert same(updated(plan_of("state", chunk, **train)), expected) == []


@pytest.mark.parametrize("chunk", CHUNKS)
def test_training_with_streamed_state_is_the_same_to_the_bit(chunk: str) -> None:
    losses, expected = trained(plan_of("none"))
    again, repeated = trained(plan_of("none"))
    if (again, same(repeated, expected)) != (losses, []):
        pytest.skip("this device does not repeat itself without offload")
    streamed, found = trained(plan_of("state", chunk))
    assert streamed == losses and same(found, expected) == []


@pytest.mark.parametrize("grad", ["bf16", "fp32"])
def test_updates_on_the_host_are_the_devices_up_to_rounding(grad: str) -> None:
    expected = updated(plan_of("none", grad_dtype=grad))
    found = updated(plan_of("update", grad_dtype=grad))
    for name, tensor in expected.items():
        tolerance = 1e-2 if name.endswith("parameters") else 2e-5  # bf16 may round to the other neighbour
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance * 0.1, msg=name)


def test_training_on_the_host_follows_the_devices() -> None:
    losses, _ = trained(plan_of("none"))
    found, state = trained(plan_of("update"))
    assert found == pytest.approx(losses, rel=1e-3)
    for name, tensor in state.items():  # what returned is what the host has
        if name.endswith("parameters"):
            assert torch.equal(tensor, state[name.replace("parameters", "masters")].to(tensor.dtype)), name


def test_the_host_repeats_itself_to_the_bit() -> None:
    """Nothing that is under way is read or written too early: it would not come out alike."""
    once = updated(plan_of("update"))
    for _ in range(3):
        assert same(updated(plan_of("update")), once) == []


@pytest.mark.parametrize("offload", ["state", "update"])
def test_the_host_is_not_stopped_in_the_middle_of_a_step(offload: str) -> None:
    plan = plan_of(offload)
    runtime, optimizer = composed(plan)
    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, 3)
    collect, update = runtime.states.collect_gradients, runtime.states.update

    def guarded(function: Any) -> Any:
        def call(*arguments: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                function(*arguments)
                runtime.states.home.settle()  # the worker is watched too
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    runtime.states.collect_gradients = guarded(collect)  # type: ignore[method-assign]
    runtime.states.update = guarded(update)  # type: ignore[method-assign]
    for step in range(2):
        train_step(runtime, optimizer, rank_batch(runtime, samples, step), LR)


@pytest.mark.parametrize(("offload", "per_parameter"), [("none", 16.0), ("state", 4.0), ("update", 4.0)])
def test_device_memory_between_steps(offload: str, per_parameter: float) -> None:
    """By the allocator: nothing but parameters, gradients and the slots stays on the device."""
    trained(plan_of("none"))  # what libraries keep for themselves is there already
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    plan = plan_of(offload, "1 MiB")
    runtime, optimizer = composed(plan)
    samples = RandomSamples(plan.architecture.vocab, plan.sequence_length, 3)
    for step in range(2):
        train_step(runtime, optimizer, rank_batch(runtime, samples, step), LR)
    runtime.states.home.settle()
    torch.cuda.synchronize()
    gc.collect()
    held = torch.cuda.memory_allocated() - before - sum(slot.nbytes for slot in runtime.states.home.buffers())
    assert held / plan.architecture.num_parameters == pytest.approx(per_parameter, abs=0.5)


def test_host_memory_is_pinned_and_given_back() -> None:
    runtime, optimizer = composed(plan_of("update"))
    unit = runtime.states.units[0]
    state = optimizer.state(unit.name)["exp_avg"]
    assert unit.masters.device.type == state.device.type == "cpu"
    assert unit.masters.is_pinned() and state.is_pinned()
    del runtime, unit, optimizer
    gc.collect()
    assert not state.is_pinned() and float(state.sum()) == 0.0
