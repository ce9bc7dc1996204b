"""`leanmoe eval`: what plans cost on tasks, replies and texts, beside the full model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leanmoe.cli.options import AsJson, Output, Overwrite, make_console, print_json
from leanmoe.cli.verb import command_line
from leanmoe.eval.settings import EvalSettings
from leanmoe.results.eval import EvalResults


def eval(
    settings: EvalSettings,
    plan: Annotated[
        list[Path] | None, typer.Option(help="The file of a plan; may be repeated.")
    ] = None,
    level: Annotated[
        list[str] | None,
        typer.Option(help="A level to run, of a plan that has several; may be repeated."),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(help="A rule for every layer, like top_k=6,renormalise=0; may be repeated."),
    ] = None,
    output: Output = Path("runs/eval"),
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Compare plans with the full model on tasks, replies and texts, question by question.

    A run that was stopped goes on where it was; more plans can be added to it.

    Example:
    leanmoe eval reference --rule top_k=6 --tasks none --domain mine=my.txt
    """
    from leanmoe.eval.run import evaluate
    from leanmoe.report.write import write_page

    plans = (plan or [], level or [], rule or [])
    results = evaluate(settings, *plans, output, command_line(), overwrite)
    write_page(output)
    if as_json:
        print_json({"run": str(output), **results.to_json()})
        return
    _show(results, output)


def _show(results: EvalResults, folder: Path) -> None:
    from leanmoe.eval.run import MEAN
    from leanmoe.report.eval_tables import console_tables

    console = make_console()
    for table in console_tables(results, console):
        console.print(table)
    for row in results.tasks:
        if row.task == MEAN or len({each.task for each in results.tasks}) == 1:
            console.print(f"{row.plan}, {row.task}: {row.verdict.reason}.")
    console.print(f"Results: {folder / 'results.json'}   Page: {folder / 'report.html'}")
