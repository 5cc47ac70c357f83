"""The largest model that trains under a cap of device memory, with and without offload: a search over layers."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.gpu.memory import FORMS
from benchmarks.gpu.record import Section
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.trial import attempt

GIB = 1 << 30
_MOST_LAYERS = 256
# Of bytes per parameter that stay on the device: where the search begins, not what it finds.
_RESTING = {"none": 16.0, "state": 4.0, "update": 3.0}


def run(scale: Scale, cap: int | None, cases: list[str], seconds: float) -> Section:
    """For each form the most layers that train, the fewest that do not, and every trial between."""
    on_gpu = scale.device.type == "cuda"
    cap = cap or (8 * GIB if on_gpu else 8 << 20)
    deadline = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    lines = ["| offload | layers | parameters | fewest that do not fit | device peak, GB | host, GB | s a step |"]
    lines.append("|---|---|---|---|---|---|---|")
    for form in [form for form in FORMS if not cases or form in cases]:
        trials = Trials(scale, form, cap, deadline)
        trials.search(_first_guess(scale, form, cap))
        rows += trials.rows
        lines.append(trials.line())
    notes = [
        f"the cap is {cap / GIB:.3g} GiB a process; one sequence of {scale.sequence_length} tokens a step, bf16, "
        f"hidden {scale.model['hidden']}, ffn {scale.model['ffn']}, vocab {scale.model['vocab']}, bf16 gradients; each "
        "trial on a GPU trains two steps in a process of its own",
        "the cap is enforced by the allocator (torch.cuda.set_per_process_memory_fraction)"
        if on_gpu
        else "on a CPU the cap is compared with the plan's estimate, not enforced; what fits is run for a step",
    ]
    return Section("capacity", "\n".join(lines), rows, notes)


def _first_guess(scale: Scale, form: str, cap: int) -> int:
    """Layers by the bytes that rest on the device, less a tenth for what a step adds."""
    one, two = (scale.plan(model={"layers": n}).architecture.num_parameters for n in (1, 2))
    layers = (0.9 * cap / _RESTING[form] - (one - (two - one))) / (two - one)
    return min(_MOST_LAYERS, max(1, int(layers)))


class Trials:
    """The trials of one form. A larger model never fits where a smaller one does not."""

    def __init__(self, scale: Scale, form: str, cap: int, deadline: float) -> None:
        self.scale, self.form, self.cap, self.deadline = scale, form, cap, deadline
        self.rows: list[dict[str, Any]] = []
        self.refused, self.late = "", False

    def search(self, guess: int) -> None:
        """Widen steps from the guess until both sides of the line are known, then halve, to a fiftieth at worst."""
        bracket(self.fits, guess, _MOST_LAYERS)

    def fits(self, layers: int) -> bool | None:
        """Whether so many layers train; None where no answer can be had."""
        if self.refused or time.monotonic() > self.deadline:
            self.late = not self.refused
            return None
        found = self._attempt(layers)
        if found is None:
            self.late = True
            return None
        if "refused" in found:
            self.refused = found["refused"]
            return None
        self.rows.append(found)
        print(f"{self.form}: {json.dumps(found)}", file=sys.stderr, flush=True)
        return found["fits"]

    def _attempt(self, layers: int) -> dict[str, Any] | None:
        """What a trial found: on a GPU in a process of its own. None where the time was up first."""
        scale = replace(self.scale, model=self.scale.model | {"layers": layers}, micro_batch_size=1, microbatches=1)
        if scale.device.type == "cpu":
            return attempt(scale, self.form, self.cap)
        fields = {field.name: getattr(scale, field.name) for field in dataclasses.fields(scale)}
        given = {"scale": fields | {"device": str(scale.device)}, "form": self.form, "cap": self.cap}
        command = [sys.executable, "-m", "benchmarks.gpu.trial", json.dumps(given)]
        left = max(30.0, self.deadline - time.monotonic() + 60.0)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            return None
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])

    def line(self) -> str:
        """The row of the table."""
        fitting = [row for row in self.rows if row["fits"]]
        if not fitting:
            why = f"not built yet: {self.refused}" if self.refused else "nothing fits" if self.rows else "no time"
            return f"| {self.form} | {why} | | | | | |"
        best = max(fitting, key=lambda row: row["layers"])
        above = [row["layers"] for row in self.rows if not row["fits"]]
        limit = f"{min(above)}{', search cut short' if self.late else ''}" if above else "not reached"
        step = f"{best['seconds_step']:.2f}" if "seconds_step" in best else ""
        sizes = " | ".join(f"{best[key] / 1e9:.3g}" for key in ("peak_bytes", "host_bytes"))
        return f"| {self.form} | {best['layers']} | {best['parameters'] / 1e9:.3f} B | {limit} | {sizes} | {step} |"


def bracket(fits: Callable[[int], bool | None], guess: int, most: int) -> tuple[int, int]:
    """(most that fits, fewest that does not) as far as answers go: 0 and most + 1 stand for not known."""
    low, high, stride, here = 0, most + 1, max(1, guess // 8), guess
    while high - low > 1 + low // 50:
        answer = fits(here)
        if answer is None:
            break
        low, high = (here, high) if answer else (low, here)
        if low and high <= most:
            here = (low + high) // 2
        else:
            here = min(here + stride, most) if answer else max(here - stride, 1)
            stride *= 2
        if here in (low, high):
            break
    return low, high
