"""Training throughput and MFU of one rank, beside the plain PyTorch equivalent, eager and compiled."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import nn

from benchmarks.gpu.race import Contender, Race, Training, table
from benchmarks.gpu.record import Section, rows_of
from benchmarks.gpu.scale import Engine, Scale, samples_of
from benchmarks.peers.plain import Trainer
from shardwright.data.batch import Batch
from shardwright.nn.kernels import Kernels
from shardwright.parallel.compiled import compile_kernels
from shardwright.train.batches import global_positions
from shardwright.train.step import to_device

TOLERANCE = 2e-3
"""By which two bf16 forwards of the same values may differ in their mean loss."""


class _Switch:
    """A composed model's kernels, eager or as `run.compile` makes them; both forms share the state."""

    def __init__(self, model: nn.Module) -> None:
        eager = _kernels(model)
        compile_kernels(model)
        self._forms = {False: eager, True: _kernels(model)}

    def switch(self, compiled: bool) -> None:
        """Let every module use the one or the other."""
        for module, kernels in self._forms[compiled]:
            module.kernels = kernels  # type: ignore[assignment]


def _kernels(model: nn.Module) -> list[tuple[nn.Module, Kernels]]:
    held = [(module, getattr(module, "kernels", None)) for module in model.modules()]
    return [(module, kernels) for module, kernels in held if isinstance(kernels, Kernels)]


class Contenders:
    """The two trainers, each made once: what is compiled and what is not share parameters and optimizer.

    `losses` are each one's mean loss of the first batch before any update.
    """

    def __init__(self, scale: Scale) -> None:
        self.scale, self.plan = scale, scale.plan()
        self.samples, self.losses = samples_of(self.plan), dict[str, float]()
        self.engine, self.trainer = cache(self._engine), cache(self._trainer)
        self.kernels = cache(lambda: _Switch(self.engine().runtime.model))

    def all(self) -> list[Contender]:
        """Peers first."""
        compiled = partial(self._ours, True)
        return [
            Contender("plain, eager", self._plain),
            Contender("plain, layers compiled", partial(self._plain, "by_layer"), "plain, eager", "plain, eager"),
            Contender("plain, whole compiled", partial(self._plain, "whole"), "plain, eager", "plain, eager"),
            Contender("shardwright, eager", partial(self._ours, False), "plain, eager"),
            Contender("shardwright, compiled", compiled, "plain, layers compiled", "shardwright, eager"),
        ]

    def _first(self) -> Batch:
        return self.samples.at(global_positions(self.plan, 0))

    def _engine(self) -> Engine:
        engine, batch = Engine.of(self.plan, self.scale.device), self._first()
        microbatches = to_device(batch, self.plan.spec.train.micro_batch_size, self.scale.device)
        self.losses["shardwright"] = float(engine.runtime.pipeline.evaluate(microbatches)) / batch.num_targets()
        return engine

    def _trainer(self) -> Trainer:
        trainer = Trainer(self.plan, self.scale.device)
        self.losses["plain"] = trainer.loss(self._first())
        return trainer

    def _plain(self, form: str = "") -> Training:
        trainer = self.trainer()
        forward = getattr(trainer, form)() if form else None
        return Training(lambda index: trainer.step(self.samples.at(global_positions(self.plan, index)), forward))

    def _ours(self, compiled: bool) -> Training:
        engine, kernels = self.engine(), self.kernels()

        def step(index: int) -> float:
            kernels.switch(compiled)
            return engine.step(index)

        return Training(step)

    def agreement(self) -> str:
        """Both first losses, beside each other. Raises AssertionError where they are of different models."""
        said = ", ".join(f"{name} {loss:.5f}" for name, loss in self.losses.items())
        least, most = min(self.losses.values(), default=0.0), max(self.losses.values(), default=0.0)
        assert most - least <= TOLERANCE * least, f"same values, different first losses: {said}"
        return f"first loss: {said}"


def run(scale: Scale, rounds: int, steps: int, only: list[str], profile: bool = False) -> Section:
    """The race; with `profile` also where the time of one step of each goes."""
    contenders = Contenders(scale)
    chosen = [c for c in contenders.all() if not only or any(part in c.name for part in only)]
    results = Race(chosen, scale.device, keep=True).run(rounds, steps)
    text = table(results, contenders.plan, scale.tokens_per_step, scale.device, ["seconds_to_warm_up"])
    if profile:
        ran = {result.name for result in results if not result.refused}
        text += "".join(_profiled(c, scale.device) for c in chosen if c.name in ran)
    return Section("throughput", text, rows_of(results), _notes(contenders, scale))


def _notes(contenders: Contenders, scale: Scale) -> list[str]:
    plan = contenders.plan
    a = plan.architecture
    return [
        f"{a.num_parameters / 1e9:.3f} B parameters: {a.layers} layers, hidden {a.hidden}, {a.heads} heads "
        f"({a.kv_heads} kv), ffn {a.ffn}, vocab {a.vocab}; {scale.microbatches} microbatches of "
        f"{scale.micro_batch_size} sequences of {scale.sequence_length} tokens a step",
        f"{plan.dtype} parameters, {plan.grad_dtype} gradients (the plain one's are bf16), fp32 masters, fused AdamW, "
        "clipped to a global norm of 1",
        contenders.agreement(),
        "MFU counts attention whole (PaLM's convention) and no recomputation",
        "eager and compiled forms of one side share parameters and optimizer; peak is state plus what a step adds",
    ]


def _profiled(contender: Contender, device: torch.device) -> str:
    """The kernels of one step by their time."""
    step = contender.make().step
    step(0)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step(1)
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = profiler.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=80)
    return f"\n\n### {contender.name}, one step\n\n```\n{found}\n```"
