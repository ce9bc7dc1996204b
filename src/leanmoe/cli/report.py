"""`leanmoe report`: the page of a finished run, written again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json, write_text


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
    from leanmoe.report import write_report
    from leanmoe.report.svg import verdict_svg
    from leanmoe.results.tune import read_results

    kind = _kind(run)
    if svg is not None and kind != "tune":
        raise LeanMoeError(f"--svg draws the verdict of a tune run: {run} holds a run of {kind}")
    if kind == "tune":
        page = write_report(run, output)
    else:
        page = output or run / "report.html"
        _write(kind, run / "results.json", page)
    if svg is not None:
        write_text(svg, verdict_svg(read_results(run / "results.json")))
    if as_json:
        print(json.dumps({"report": str(page), "svg": None if svg is None else str(svg)}))
        return
    print(f"The page: {page}")
    if svg is not None:
        print(f"The picture: {svg}")


def _kind(run: Path) -> str:
    """Which verb's results a folder holds."""
    results = read_json(run / "results.json", "results")
    kinds = (kind for kind in ("bench", "eval") if f"leanmoe_{kind}" in results)
    return next(kinds, "tune") if isinstance(results, dict) else "tune"


def _write(kind: str, results: Path, page: Path) -> None:
    if kind == "bench":
        from leanmoe.report.bench_page import write_bench_page

        write_bench_page(results, page)
    else:
        from leanmoe.report.quality_page import write_quality_page
        from leanmoe.results.eval import read_evaluation

        write_quality_page(read_evaluation(results), page)
