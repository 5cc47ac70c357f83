"""What a checkpoint holds, as a document and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from shardwright.report.table import ends, print_table, table
from shardwright.units import format_bytes, format_count


def print_checkpoint(document: Mapping[str, Any], console: Console) -> None:
    """The document of `checkpoint inspect` for people."""
    console.print(
        f"[bold]{document['path']}[/]  {format_count(document['parameters'])} parameters, "
        f"{format_bytes(document['bytes'])} in {len(document['files'])} files"
    )
    kinds = ", ".join(f"{kind} {dtype}" for kind, dtype in document["kinds"].items())
    console.print(f"holds      {kinds}; computes in {document['dtype']}")
    training = document["training"]
    if training is None:
        console.print("training   weights alone: model.init_from takes them")
    else:
        console.print(
            f"training   step {training['step']}, position {training['position']} of the data, "
            f"{training['optimizer']}, seed {training['seed']}, written by {training['world_size']} ranks"
        )
    if document["layout"]:
        console.print(f"layout     {document['layout']}; it can be read on any other")
    if document["companions"]:
        console.print(f"beside     {', '.join(document['companions'])}")
    console.print()
    rows = table("tensor", "shape", "elements", left=("tensor", "shape"))
    for entry in ends(list(document["tensors"].items())):
        if entry is None:
            rows.add_row("...", "", "")
            continue
        name, tensor = entry
        rows.add_row(name, " x ".join(map(str, tensor["shape"])), f"{tensor['elements']:,}")
    print_table("tensors", rows, console)
    console.print()
    files = table("file", "bytes", "boxes", "sha256", left=("file", "sha256"))
    for file in ends(document["files"]):
        if file is None:
            files.add_row("...", "", "", "")
        else:
            files.add_row(file["name"], format_bytes(file["bytes"]), str(file["boxes"]), file["sha256"][:16])
    print_table("files", files, console)
