"""Contenders that take turns on one device, in one process: rounds, medians, ratios by pairs, peak memory of each."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness import quartiles
from shardwright.cost.hardware import mfu, peak_flops
from shardwright.errors import ShardwrightError
from shardwright.plan.plan import Plan


@dataclass(frozen=True)
class Training:
    """`step` runs training step i and returns its loss. `settle` waits for what a step leaves under way on the host."""

    step: Callable[[int], float]
    settle: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Contender:
    """`make` builds it. `peer` names whom it is compared with; `shares` whose state it uses."""

    name: str
    make: Callable[[], Training]
    peer: str = ""
    shares: str = ""


@dataclass
class Result:
    """What a contender did: seconds a step by round, bytes of its state and the most that a step adds to them.

    `refused` says why it did not run. `facts` are a section's own figures.
    """

    name: str
    peer: str
    seconds: list[float] = field(default_factory=list)
    state_bytes: int = 0
    step_bytes: int = 0
    refused: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """The most that it holds on the device."""
        return self.state_bytes + self.step_bytes


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clean(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def allocated(device: torch.device) -> int:
    """Bytes of live tensors on the device; 0 on a CPU, where they are not counted."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


class Race:
    """Contenders on a device. With `keep` all of them exist at the same time; else each is made anew for its turn."""

    def __init__(self, contenders: Sequence[Contender], device: torch.device, *, keep: bool) -> None:
        self._contenders, self._device, self._keep = contenders, device, keep
        self._made: dict[str, Training] = {}
        self.results = {c.name: Result(c.name, c.peer) for c in contenders}

    def run(self, rounds: int, steps: int, warmup: int = 2) -> list[Result]:
        """`rounds` turns of `steps` steps each for everyone, in alternating order, after `warmup` steps of its own."""
        for index in range(rounds):
            order = self._contenders if index % 2 == 0 else list(reversed(self._contenders))
            for contender in order:
                if not self.results[contender.name].refused:
                    self._turn(contender, steps, warmup)
            print(f"round {index + 1}/{rounds}", file=sys.stderr, flush=True)
        self._made.clear()
        clean(self._device)
        return list(self.results.values())

    def _turn(self, contender: Contender, steps: int, warmup: int) -> None:
        result = self.results[contender.name]
        try:
            if contender.name not in self._made:
                self._make(contender, warmup)
            self._measure(result, self._made[contender.name], steps)
        except ShardwrightError as error:
            result.refused = f"not built yet: {error.problem}" if "not built" in error.problem else str(error)
        except torch.OutOfMemoryError as error:
            result.refused = f"out of memory: {str(error).splitlines()[0]}"
        except Exception as error:  # one contender, a compiler say, must not end the others' race
            traceback.print_exc()
            result.refused = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if result.refused:
            print(f"{result.name}: {result.refused}", file=sys.stderr, flush=True)
        if not self._keep or result.refused:
            self._made.pop(contender.name, None)
            clean(self._device)

    def _make(self, contender: Contender, warmup: int) -> None:
        result, before = self.results[contender.name], allocated(self._device)
        began = time.perf_counter()
        made = contender.make()
        for index in range(warmup):
            made.step(index)
        made.settle()
        synchronize(self._device)
        result.facts.setdefault("seconds_to_warm_up", round(time.perf_counter() - began, 2))
        self._made[contender.name] = made
        owner = self.results.get(contender.shares)
        result.state_bytes = owner.state_bytes if owner else allocated(self._device) - before

    def _measure(self, result: Result, made: Training, steps: int) -> None:
        before = allocated(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        synchronize(self._device)
        began = time.perf_counter()
        for index in range(steps):
            made.step(index)
        made.settle()
        synchronize(self._device)
        result.seconds.append((time.perf_counter() - began) / steps)
        if self._device.type == "cuda":
            result.step_bytes = max(result.step_bytes, torch.cuda.max_memory_allocated(self._device) - before)


def ratio(result: Result, results: Sequence[Result]) -> tuple[float, float, float] | None:
    """Quartiles of how many times faster a contender is than its peer, round by round."""
    peer = next((other for other in results if other.name == result.peer), None)
    if peer is None or not peer.seconds or len(peer.seconds) != len(result.seconds):
        return None
    return quartiles([theirs / ours for ours, theirs in zip(result.seconds, peer.seconds, strict=True)])


def device_name(device: torch.device) -> str:
    """As the maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def utilisation(plan: Plan, seconds: float, tokens: int, device: torch.device) -> float | str:
    """MFU of a step, or why it is unknown."""
    peak = peak_flops(device_name(device), plan.dtype)
    return mfu(plan.architecture.flops_per_token(plan.sequence_length), tokens / seconds, 1, peak)


def table(results: Sequence[Result], plan: Plan, tokens: int, device: torch.device, facts: Sequence[str] = ()) -> str:
    """A row for every contender, Markdown; `facts` become columns of their own."""
    heads = ["case", "ms a step (quartiles)", "tokens/s", "MFU", "beside its peer", "state, GB", "peak, GB", *facts]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for result in results:
        if result.refused or not result.seconds:
            lines.append(f"| {result.name} | {result.refused or 'did not run'} |" + " |" * (len(heads) - 2))
            continue
        low, middle, high = quartiles(result.seconds)
        used = utilisation(plan, middle, tokens, device)
        beside = ratio(result, results)
        cells = [
            result.name,
            f"{middle * 1e3:.1f} ({low * 1e3:.1f} to {high * 1e3:.1f})",
            f"{tokens / middle:,.0f}",
            used if isinstance(used, str) else f"{used:.1%}",
            "" if beside is None else f"**{beside[1]:.2f}** ({beside[0]:.2f} to {beside[2]:.2f}) x {result.peer}",
            *(f"{size / 1e9:.3g}" if size else "" for size in (result.state_bytes, result.peak_bytes)),
            *(_shown(result.facts.get(fact, "")) for fact in facts),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
