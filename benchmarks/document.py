"""Documentation that shows records: what stands between two marks is the record's own table.

<!-- record: race_tp_small-25m_fp32 -->
...
<!-- end of record -->
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.harness import RECORDS

DOCUMENTS = Path(__file__).parent.parent / "docs"
_SHOWN = re.compile(r"<!-- record: (\S+) -->\n.*?<!-- end of record -->", re.DOTALL)


def written(text: str) -> str:
    """A document's text with the tables of its records as they are now."""

    def replaced(match: re.Match[str]) -> str:
        record = RECORDS / f"{match[1]}.md"
        body = record.read_text().strip() if record.exists() else "Not measured yet."
        return f"<!-- record: {match[1]} -->\n{body}\n<!-- end of record -->"

    return _SHOWN.sub(replaced, text)


def update() -> None:
    """Bring every document up to date."""
    for path in sorted(DOCUMENTS.glob("*.md")):
        before = path.read_text()
        if (after := written(before)) != before:
            path.write_text(after)


if __name__ == "__main__":
    update()
