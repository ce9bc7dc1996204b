"""`leanmoe study`: the paper's study, rerun."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from leanmoe.core.errors import LeanMoeError


def study(
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder.")] = Path("runs/study"),
    quality: Annotated[
        str,
        typer.Option(help="'measured' here (minutes), 'none', or an earlier study's JSON."),
    ] = "measured",
    model: Annotated[
        str, typer.Option(help="That quality is measured on: a folder, a hub name, 'reference'.")
    ] = "reference",
    text: Annotated[
        str | None,
        typer.Option(help="A .txt or .jsonl file, a folder, or a Hugging Face data set."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Quality on little text, to see that it runs.")
    ] = False,
    tuned: Annotated[
        Path | None,
        typer.Option(help="results.json of a leanmoe tune: what a searched plan gave, measured."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every shuffle and draw.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Repeat the paper's study and put its claims in a table: one page, JSON, this table.

    Example:
    leanmoe study -o runs/study
    """
    from leanmoe.report.write import write_page
    from leanmoe.study.run import PAGE, earlier_quality
    from leanmoe.study.run import study as run

    section: dict[str, Any] | None = None
    if quality == "measured":
        from leanmoe.study.quality import QualitySettings, saved_quality

        section = saved_quality(QualitySettings(model, text, quick=quick, seed=seed), output)
    elif quality.endswith(".json"):
        section = earlier_quality(Path(quality))
    elif quality != "none":
        raise LeanMoeError(
            f"--quality is {quality!r}: it must be 'measured', 'none' or a study.json"
        )
    results = run(output, section, " ".join(["leanmoe", *sys.argv[1:]]), seed, tuned)
    write_page(output, output / PAGE)
    if as_json:
        print(json.dumps(results))
        return
    _show(results)
    print(f"The page: {output / PAGE}")


def _show(results: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("claim", "the paper", "ours", "verdict"):
        table.add_column(heading, vertical="top")
    for claim in results["claims"]:
        table.add_row(claim["claim"], claim["paper"], claim["ours"], claim["verdict"])
    console.print(table)
    rows = results["table_9"]["rows"]
    console.print(
        "DeepSeek-V3, 8 H200: gain of k = 6 and 4, modelled (cited): "
        + "; ".join(
            f"{r['concurrency']}: {r['gain']['6']:+.1f} ({r['paper_gain']['6']:+.1f}) and "
            f"{r['gain']['4']:+.1f} ({r['paper_gain']['4']:+.1f})"
            for r in rows
        )
    )
