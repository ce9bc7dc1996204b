"""The command line: one file a verb; a user's mistake is one line on standard error."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from leanmoe.cli.inspect import inspect
from leanmoe.cli.report import report
from leanmoe.cli.tune import tune
from leanmoe.errors import LeanMoeError

app = typer.Typer(
    name="leanmoe",
    help="Makes mixture-of-experts models faster by running fewer experts; proves what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(inspect)
app.command()(tune)
app.command()(report)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """leanmoe."""
    if debug:
        sys.excepthook = sys.__excepthook__


def main() -> None:
    """Runs the command line; exits with 1 for a LeanMoeError, 130 when interrupted."""
    debug = "--debug" in sys.argv
    try:
        app()
    except LeanMoeError as error:
        if debug:
            raise
        print(f"leanmoe: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("leanmoe: interrupted", file=sys.stderr)
        sys.exit(130)
