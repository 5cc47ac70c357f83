"""The `shardwright` command. What a command needs is imported in its body, so that help answers at once."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from shardwright import __version__
from shardwright.cli.checkpoint import app as checkpoint
from shardwright.cli.compare import compare
from shardwright.cli.data import app as data
from shardwright.cli.generate import generate
from shardwright.cli.plan import plan
from shardwright.cli.report import report
from shardwright.cli.train import train
from shardwright.cli.verify import verify
from shardwright.errors import ShardwrightError

_HELP = """Train and run decoder-only language models under any mix of parallelism, and prove that the mix is right.

\b
Example: shardwright train recipes/quickstart.toml train.steps=50
"""

app = typer.Typer(
    name="shardwright",
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an exception that is not a ShardwrightError is a defect and shows as it is
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(plan)
app.command()(train)
app.command()(verify)
app.command()(compare)
app.command()(generate)
app.command()(report)
app.add_typer(data, name="data")
app.add_typer(checkpoint, name="checkpoint")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shardwright {__version__}")
        raise typer.Exit


@app.callback()
def _shardwright(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs a command: exit code 2 and one `error:` for a ShardwrightError, 130 for Ctrl-C."""
    try:
        app(prog_name="shardwright")
    except ShardwrightError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
