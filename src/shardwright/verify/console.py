"""A proof, for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from shardwright.plan.describe import layout
from shardwright.plan.plan import Plan
from shardwright.train.console import make_console
from shardwright.verify.compare import KINDS, Difference
from shardwright.verify.proof import Proof


def print_shrunk(plan: Plan, shrunk: list[str]) -> None:
    """What is proved, and what was made smaller for it."""
    console = make_console()
    zero = plan.spec.parallel.zero
    console.print(f"{layout(plan)}, zero {zero}, {plan.num_microbatches} microbatches, beside one device")
    if shrunk:
        console.print(f"shrunk, the layout kept: {'; '.join(shrunk)}")


def print_report(plan: Plan, proofs: Sequence[Proof]) -> None:
    """The largest error of each kind beside the bar and the noise, and the first tensor that differs."""
    console = Console(highlight=False)
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for heading in ("", "largest error", "may be", "rounding noise", ""):
        table.add_column(heading, justify="left" if not heading else "right")
    for proof in proofs:
        for kind in KINDS:
            error = proof.comparison.errors()[kind]
            label = f"{proof.plan.dtype} {kind}"
            if error is None:
                table.add_row(label, "not compared", "", "", "")
                continue
            bar = proof.bars[kind]
            mark = "[green]ok[/]" if error <= bar else "[red]DIFFERS[/]"
            table.add_row(label, f"{error:.1e}", f"{bar:.1e}", f"{proof.noise[kind]:.1e}", mark)
    console.print(table)
    for proof in proofs:
        if proof.comparison.missing:
            console.print(f"[red]{proof.comparison.missing}[/]")
        if proof.comparison.first_difference:
            _print_difference(console, proof.plan.dtype, proof.comparison.first_difference)
    passed = all(proof.passed for proof in proofs)
    steps = proofs[0].steps
    verdict = f"computes what one device computes, over {steps} steps" if passed else "DIFFERS from one device"
    console.print(f"[{'green' if passed else 'red'}]{layout(plan)}: {verdict}[/]", soft_wrap=True)


def _print_difference(console: Console, dtype: str, first: Difference) -> None:
    where = f"step {first.step}, {first.kind} of {first.box}" if first.kind != "loss" else f"step {first.step}, loss"
    console.print(
        f"first difference in {dtype}: {where}, on rank {first.owner}\n"
        f"  element {list(first.element)}: {first.value:.17g}, on one device {first.expected:.17g} "
        f"(error {first.error:.1e})",
        soft_wrap=True,
    )
