"""`leanmoe report`: the page of a finished run, written again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leanmoe.cli.options import AsJson, print_json
from leanmoe.report.settings import ReportSettings


def report(
    settings: ReportSettings,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page's file; by default RUN/report.html."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the page of a run from its saved results; nothing is measured.

    Example:
    leanmoe report runs/demo
    """
    from leanmoe.report.write import write_page

    page = write_page(settings.run, output)
    if as_json:
        print_json({"report": str(page)})
    else:
        print(f"The page: {page}")
