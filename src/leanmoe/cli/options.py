"""Options that the command line alone has: where results go and how they are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

Output = Annotated[
    Path, typer.Option("--output", "-o", help="The folder that everything is written to.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the results of another run in the folder.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of words and tables.")]


def print_json(value: Any) -> None:
    """Prints a value as JSON, alone on standard output."""
    print(json.dumps(value))


def make_console() -> Console:
    """A console that prints words as they are: brackets in names and paths are no markup."""
    from rich.console import Console

    return Console(highlight=False, markup=False)
