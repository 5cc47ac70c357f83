"""The seed's columns, derived from numbers by stated rules.

Note: the rules.
    Memory efficiency: what one device takes at its peak over what all ranks take, each at the peak of the fullest. It
    is 1 where a technique divides everything, and 1 / N where it divides nothing.
    Communication cost: bytes that the busiest rank sends in a step over those of plain data parallelism, which are
    2 (N - 1) / N times the gradients.
    Implementation complexity: lines of the files that are there for the technique alone.
    Scalability: see `growth.py`.
    In words: memory above 3/4 is very high, above 1/2 high, above 1/3 medium; communication up to 1/2 is low, up to 5/4
    medium; up to 150 lines are low, up to 1,000 medium, up to 2,000 high.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shardwright.cost.hardware import Hardware
from shardwright.cost.memory import BYTES
from shardwright.plan.growth import largest
from shardwright.plan.techniques import Technique
from shardwright.spec.architecture import Architecture
from shardwright.spec.spec import Spec
from shardwright.units import Bytes

WORLDS = (8, 64, 512)
_PACKAGE = Path(__file__).parents[1]


def derived(
    techniques: Sequence[Technique],
    rows: Sequence[dict[str, Any]],
    spec: Spec,
    model: Architecture,
    world: int,
    hardware: Hardware,
    usable: Bytes,
) -> list[dict[str, Any]]:
    """Of each technique its columns; what needs a row that was not measured is None."""
    named = {row["name"]: row for row in rows}
    alone = _peak(named.get("one device"))
    gradients = model.num_parameters * BYTES[spec.train.grad_dtype]
    made = []
    for technique in techniques:
        row = named[technique.name]
        ranks, peak = row.get("ranks"), _peak(row)
        sent = row["communication"]["sent"]["measured"] if "communication" in row else None
        whole = 2 * (world - 1) * gradients / world
        memory = alone / (ranks * peak) if alone and peak and ranks else None
        traffic = sent / whole if sent is not None and whole else None
        lines = code_lines(technique)
        here = 1 if technique.single else world
        worlds = () if technique.single else WORLDS
        scales = {str(n): _asdict(largest(technique, spec, model, n, hardware, usable)) for n in worlds}
        made.append(
            {
                "name": technique.name,
                "memory_efficiency": memory,
                "memory": _word(memory, ((3 / 4, "very high"), (1 / 2, "high"), (1 / 3, "medium")), "low"),
                "traffic": traffic,
                "communication": _word_up(traffic, ((0, "none"), (1 / 2, "low"), (5 / 4, "medium")), "high"),
                "lines": lines,
                "complexity": _word_up(
                    lines, ((0, "none"), (150, "low"), (1000, "medium"), (2000, "high")), "very high"
                ),
                "largest": _asdict(largest(technique, spec, model, here, hardware, usable)),
                "scalability": scales,
            }
        )
    return made


def code_lines(technique: Technique) -> int:
    """Lines of code of the technique's own files, without empty ones."""
    files = {file for name in technique.modules for file in _files(_PACKAGE / name)}
    return sum(1 for file in sorted(files) for line in file.read_text(encoding="utf-8").splitlines() if line.strip())


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def _asdict(grown: Any) -> Any:
    return grown if isinstance(grown, str) else asdict(grown)


def _peak(row: dict[str, Any] | None) -> int | None:
    """The measured peak of the fullest rank; the estimate where peaks are not measured."""
    if row is None or "memory" not in row:
        return None
    return row["memory"]["measured"]["peak"] or row["memory"]["estimated"]["peak"]


def _word(value: float | None, above: Sequence[tuple[float, str]], otherwise: str) -> str | None:
    return None if value is None else next((word for limit, word in above if value > limit), otherwise)


def _word_up(value: float | None, up_to: Sequence[tuple[float, str]], otherwise: str) -> str | None:
    return None if value is None else next((word for limit, word in up_to if value <= limit), otherwise)
