"""Documentation that shows records: what stands between two marks is the record's own table.

    <!-- record: race_tp_small-25m_fp32 -->
    ...
    <!-- end of record -->

`python -m benchmarks.document` brings the README and docs/ up to date. The record `race_summary` is made of all races.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.harness import RECORDS

ROOT = Path(__file__).parent.parent
_SHOWN = re.compile(r"<!-- record: (\S+) -->\n.*?<!-- end of record -->", re.DOTALL)

SETTINGS = ("small-25m_fp32", "small-25m_bf16", "llama-100m_fp32", "llama-100m_bf16")
PAIRS = [
    ("zero-0", "zero-0", "DDP|DDP bf16, masters"),
    ("zero-0", "zero-0", "DDP bf16"),
    ("zero-0", "zero-0, fp32 gradients", "DDP autocast"),
    ("zero-1", "zero-1", "DDP|DDP bf16, masters"),
    *((f"zero-{stage}", f"zero-{stage}", f"DeepSpeed ZeRO-{stage}") for stage in (1, 2, 3)),
    ("zero-2", "zero-2", "FSDP2, no resharding"),
    ("zero-3", "zero-3", "FSDP2"),
    ("tp", "tp = 2, sequence parallel", "parallelize_module"),
    ("tp", "tp = 2, sequence parallel", "parallelize_module, masters"),
    ("tp", "tp = 2, all-reduce form", "parallelize_module"),
    ("tp", "tp = 2, all-reduce form", "parallelize_module, masters"),
    ("pp", "1f1b, 5 + 3|1f1b, 7 + 5", "torch 1f1b, 4 + 4|torch 1f1b, 6 + 6"),
    ("pp", "1f1b, 5 + 3|1f1b, 7 + 5", "torch 1f1b, 4 + 4, masters|torch 1f1b, 6 + 6, masters"),
    ("pp", "zb-h1, 5 + 3|zb-h1, 7 + 5", "torch 1f1b, 4 + 4|torch 1f1b, 6 + 6"),
    ("pp", "zb-h1, 5 + 3|zb-h1, 7 + 5", "torch 1f1b, 4 + 4, masters|torch 1f1b, 6 + 6, masters"),
    *(("3d", f"2 x 2 x 2, zero = {zero}", "FSDP2 + parallelize_module + Schedule1F1B") for zero in (1, 3)),
]
"""Race, our case, its peer; `|` where their names differ from setting to setting."""

MASTERS = {"DDP|DDP bf16, masters": "DDP, in bf16 with masters by hand", "DDP bf16": "DDP, in bf16 without masters"}


def _results(race: str, setting: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Results and the most resident bytes of a race by case; empty where there is no record."""
    path = RECORDS / f"race_{race}_{setting}.json"
    if not path.exists():
        return {}, {}
    record = json.loads(path.read_text())
    memory = {peak["name"]: max(peak["peak"]) for peak in record["memory"]}
    return {result["name"]: result for result in record["results"]}, memory


def _cell(race: str, ours: str, theirs: str, setting: str) -> str:
    """Speed beside the peer's; in brackets beside the ceiling, and memory beside the peer's."""
    found, memory = _results(race, setting)
    for name in ours.split("|"):
        for peer in theirs.split("|"):
            pair = found.get(name, {}).get("beside_peers", {}).get(peer)
            if pair is not None:
                top = found[name]["of_ceiling"]
                used = f"{memory[name] / memory[peer]:.2f}" if {name, peer} <= set(memory) else "-"
                return f"**{pair[1]:.2f}** ({f'{top[1]:.2f}' if top else '-'}; {used})"
    return ""


def summary() -> str:
    """The pairs of all settings as one table."""
    raced = [name for name in SETTINGS if any(RECORDS.glob(f"race_*_{name}.json"))]
    heads = ["ours beside", *(name.replace("_", ", ").replace("small-", "").replace("llama-", "") for name in raced)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for race, ours, theirs in PAIRS:
        cells = [_cell(race, ours, theirs, setting) for setting in raced]
        if any(cells):
            first = ours.split("|")[0].replace(", 5 + 3", ", balanced")
            second = MASTERS.get(theirs, theirs.split("|")[0].replace(", 4 + 4", ", even"))
            lines.append(f"| {first} / {second} | {' | '.join(cells)} |")
    return "\n".join(lines)


def written(text: str) -> str:
    """A document's text with the tables of its records as they are now."""

    def replaced(match: re.Match[str]) -> str:
        record = RECORDS / f"{match[1]}.md"
        found = summary() if match[1] == "race_summary" else record.read_text().strip() if record.exists() else ""
        return f"<!-- record: {match[1]} -->\n{found or 'Not measured yet.'}\n<!-- end of record -->"

    return _SHOWN.sub(replaced, text)


def update() -> None:
    """Bring every document up to date."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = path.read_text()
        if (after := written(before)) != before:
            path.write_text(after)


if __name__ == "__main__":
    update()
