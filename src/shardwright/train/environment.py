"""In what a rank runs: versions and devices, nothing that names the machine or its owner."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from shardwright import __version__
from shardwright.plan.machine import num_cores


def environment(device: torch.device) -> dict[str, str]:
    """What a report says of it."""
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return {
        "shardwright": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "runs on": on,
        "cores": str(num_cores()),
        "threads": str(torch.get_num_threads()),
    }


def _cpu() -> str:
    """The model that Linux names, else the kind of processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "an unnamed CPU")
