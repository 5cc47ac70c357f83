"""A section's figures beside the command and the machine that made them."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.race import Result, device_name, ratio
from benchmarks.harness import RECORDS


@dataclass
class Section:
    """One section's outcome: Markdown for people, rows for machines, and what a reader must know."""

    name: str
    text: str
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


def rows_of(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A race's results as rows."""
    return [{**asdict(r), "peak_bytes": r.peak_bytes, "beside_peer": ratio(r, results)} for r in results]


def environment(device: torch.device) -> dict[str, Any]:
    """What was measured on."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        found["device_bytes"] = torch.cuda.get_device_properties(device).total_memory
        found["cuda"] = torch.version.cuda
    return found


def markdown(section: Section, command: str, device: torch.device) -> str:
    """The section as a page."""
    machine = ", ".join(f"{key} {value}" for key, value in environment(device).items())
    notes = "".join(f"- {note}\n" for note in section.notes)
    return f"`{command}`\n\n{machine}\n\n{section.text}\n\n{notes}"


def write(section: Section, command: str, device: torch.device, folder: Path = RECORDS) -> Path:
    """Keep a section as gpu_<name>.json and .md."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu_{section.name}.json"
    content = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(device),
        "notes": section.notes,
        "rows": section.rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(section, command, device))
    return path
