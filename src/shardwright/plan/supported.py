"""What this version cannot do yet: contract fields whose techniques are not built, refused in one line each."""

from __future__ import annotations

from typing import Any

from shardwright.errors import LayoutError
from shardwright.spec.spec import Spec

NOT_BUILT: dict[str, Any] = {
    "model.init_from": "",
}
"""Field -> the one value it can have now. An entry goes when its technique comes."""


def check_supported(spec: Spec) -> None:
    """Raises LayoutError for the first field that asks for what is not built yet."""
    for field, only in NOT_BUILT.items():
        section, name = field.split(".")
        value = getattr(getattr(spec, section), name)
        if value != only:
            runs = f"{field} = {_show(only)}" if only != "" else f"without {field}"
            raise LayoutError(f"{field}: {_show(value)} is not built yet", f"this version runs {runs}")


def _show(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
