"""`leanmoe report`: the page of a finished run, written again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a tune run, a bench or an eval.")],
    output: Annotated[
        Path | None, typer.Option(help="Where to write the page; RUN/report.html by default.")
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(help="Also draw the verdict as an SVG picture here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Writes the page of a run from its saved results; nothing is measured.

    Example:
    leanmoe report runs/demo --svg verdict.svg
    """
    from leanmoe.report.write import write_page, write_svg

    if svg is not None:
        write_svg(run, svg)
    page = write_page(run, output)
    if as_json:
        print(json.dumps({"report": str(page), "svg": None if svg is None else str(svg)}))
        return
    print(f"The page: {page}")
    if svg is not None:
        print(f"The picture: {svg}")
