"""One trial of the largest-model search, in a process of its own: `python -m benchmarks.gpu.trial '{"scale": ...}'`.

Prints one JSON line. A model that does not fit is an answer (`fits` false); anything else that fails is an error.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from benchmarks.gpu.scale import Engine, Scale
from shardwright.errors import ShardwrightError
from shardwright.plan.memory import estimated_memory
from shardwright.plan.plan import Plan
from shardwright.train.ledger import measured_memory


def attempt(scale: Scale, form: str, cap: int) -> dict[str, Any]:
    """Train two steps of a model under a cap in bytes on the device."""
    device = scale.device
    try:
        plan = scale.plan(memory={"offload": form})
    except ShardwrightError as error:
        return {"refused": error.problem}
    a = plan.architecture
    found = {"layers": a.layers, "form": form, "parameters": a.num_parameters}
    if device.type == "cpu":
        return found | _accounted(plan, cap)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(cap / total, device)
    began = time.perf_counter()
    try:
        engine = Engine.of(plan, device)
        host = int(measured_memory(engine.runtime, engine.optimizer, transient=False).host)
        built = time.perf_counter()
        losses = [engine.step(0)]
        engine.settle()
        stepped = time.perf_counter()
        losses.append(engine.step(1))  # the first one's allocations are there, so that this one shows what it rests at
        engine.settle()
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return found | {"fits": False, "seconds": time.perf_counter() - began}
    return found | {
        "fits": True,
        "losses": losses,
        "seconds_to_build": built - began,
        "seconds_first_step": stepped - built,
        "seconds_step": time.perf_counter() - stepped,
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "host_bytes": host,
    }


def _accounted(plan: Plan, cap: int) -> dict[str, Any]:
    """On a CPU there is no cap to set: the estimate is what is compared with it, and a step that fits is run."""
    record = estimated_memory(plan, 0)
    bytes_ = int(max(record.total, record.peak))
    found = {"fits": bytes_ <= cap, "peak_bytes": bytes_, "host_bytes": int(record.host), "accounted": True}
    if found["fits"]:
        engine = Engine.of(plan, torch.device("cpu"))
        found["losses"] = [engine.step(0)]
        engine.settle()
    return found


def main() -> None:
    """Read the trial from the command line, print its outcome."""
    given = json.loads(sys.argv[1])
    scale = Scale(**given["scale"] | {"device": torch.device(given["scale"]["device"])})
    if scale.device.type == "cuda":
        torch.cuda.set_device(scale.device)
    print(json.dumps(attempt(scale, given["form"], given["cap"])))


if __name__ == "__main__":
    main()
