"""Bytes, seconds and counts: parsed from what people write, printed as people read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NewType

from shardwright.errors import RecipeError

Bytes = NewType("Bytes", int)
Seconds = NewType("Seconds", float)

_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BYTES |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SECONDS = {"ms": 1e-3, "s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def _parse(text: str, units: Mapping[str, float], default: str, field: str, example: str) -> float:
    match = _QUANTITY.fullmatch(text)
    unit = match[2].lower() or default if match else ""
    if match is None or unit not in units:
        raise RecipeError(f"{field}: {text!r} is not a quantity", f'write it like "{example}"')
    return float(match[1]) * units[unit]


def parse_bytes(text: str, field: str = "bytes") -> Bytes:
    """Bytes in a text such as "64 MiB" or "1.5 GB"; a bare number is bytes. Raises RecipeError."""
    return Bytes(round(_parse(text, _BYTES, "b", field, "64 MiB")))


def parse_seconds(text: str, field: str = "seconds") -> Seconds:
    """Seconds in a text such as "10 min" or "30 s"; a bare number is seconds. Raises RecipeError."""
    return Seconds(_parse(text, _SECONDS, "s", field, "10 min"))


def format_bytes(count: float) -> str:
    """Three digits and a binary unit: 12.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def format_count(count: float) -> str:
    """Three digits and a decimal unit: 12.5 M."""
    for unit in ("", " k", " M", " B"):
        if abs(count) < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} T"


def format_seconds(seconds: float) -> str:
    """The two largest units: 1 h 05 min, 1 min 30 s, 12.3 s."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
