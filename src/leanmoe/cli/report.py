"""`leanmoe report`: the page of a finished run, written again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a tune run.")],
    output: Annotated[
        Path | None, typer.Option(help="Where to write the page; RUN/report.html by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Writes the page of a run from its saved results; nothing is measured.

    Example: leanmoe report runs/demo
    """
    from leanmoe.report import write_report

    page = write_report(run, output)
    print(json.dumps({"report": str(page)}) if as_json else f"The page: {page}")
