"""The document of a comparison made without one: rows with numbers that are all different, and one that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LEDGER = ("parameters", "gradients", "optimizer", "activations")
HOSTILE = "<img src=x onerror=alert(1)>"


def make_comparison(directory: Path, complete: bool = True, exact: bool = True) -> dict[str, Any]:
    """Writes `comparison.json` of four techniques, one with a pipeline, one that cannot be; gives the document."""
    rows = [
        _row("one device", 1, {}, exact),
        _row("data parallelism", 2, {"gradients": 4_825_344, "other": 72}, exact),
        _row("pipeline, 1f1b", 3, {"pipeline": 2_097_152, "other": 60}, exact, {"planned": 0.29, "measured": 0.41}),
    ]
    document: dict[str, Any] = {"recipe": f"{HOSTILE}.toml", "overrides": [], "world": 4, "device": "cpu", "cores": 2}
    document |= {"version": "0.1.0", "rows": [*rows, {"name": "3D", "reason": f"4 ranks are too few {HOSTILE}"}]}
    if complete:
        document |= {"derived": [_derived(row["name"], i) for i, row in enumerate(document["rows"])]}
        document |= {"hardware": "H100-SXM", "usable": 85 << 30, "directory": str(directory)}
    directory.mkdir(parents=True)
    (directory / "comparison.json").write_text(json.dumps(document))
    return document


def _row(
    name: str, factor: int, groups: dict[str, int], exact: bool, bubble: dict[str, float] | None = None
) -> dict[str, Any]:
    estimated = {part: factor * (i + 1) * 1_000_003 for i, part in enumerate(LEDGER)}
    estimated |= {"communication": 0, "offload": 0, "host": 0, "total": 7 * factor * 1_000_003}
    estimated["peak"] = sum(estimated[part] for part in LEDGER)
    measured = estimated | {"activations": estimated["activations"] + 70_001, "peak": estimated["peak"] + 80_001}
    sent = {"estimated": groups, "measured": groups if exact else {part: size + 8 for part, size in groups.items()}}
    communication = {
        "by_group": sent,
        "sent": {origin: sum(sizes.values()) for origin, sizes in sent.items()},
        "exact": sent["estimated"] == sent["measured"],
        "collectives_per_layer": 1.5,
    }
    return {
        "name": name,
        "layout": f"{factor} ranks",
        "measured_at": f"2026-01-02 10:0{factor}",
        "ranks": factor,
        "seconds": 0.3 * factor,
        "tokens_per_second": 2048 / (0.3 * factor),
        "memory": {"estimated": estimated, "measured": measured},
        "communication": communication,
        "bubble": bubble,
        "proof": {"passed": True, "bar": 1e-10, "loss": 1.6e-16, "gradients": 4.2e-13, "parameters": None},
    }


def _derived(name: str, index: int) -> dict[str, Any]:
    def grown(world: int) -> dict[str, Any]:
        size = {"parameters": (index + 1) * world * 10**8, "layers": 8 * world, "hidden": 64 * world}
        return {"world": world, **size, "efficiency": 0.9 - 0.001 * world}

    single = name == "one device"
    fields: dict[str, Any] = {"name": name, "memory_efficiency": 0.34, "memory": "medium", "traffic": 1.02}
    fields |= {"communication": "medium", "lines": 1483, "complexity": "high", "largest": grown(1)}
    fields["scalability"] = {} if single else {str(n): grown(n) for n in (8, 64, 512)}
    if name == "3D":
        fields |= {"memory_efficiency": None, "memory": None, "traffic": None, "communication": None}
        fields |= {"largest": "4 ranks are too few"}
        fields["scalability"]["8"] = "does not fit"
    return fields
