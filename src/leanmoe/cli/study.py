"""`leanmoe study`: the paper's study, rerun."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from leanmoe.cli.options import AsJson, Output, make_console, print_json
from leanmoe.cli.verb import command_line
from leanmoe.study.settings import StudySettings

if TYPE_CHECKING:
    from leanmoe.results.study import StudyResults


def study(
    settings: StudySettings, output: Output = Path("runs/study"), as_json: AsJson = False
) -> None:
    """Repeat the paper's study and put its claims in a table: one page, JSON, this table.

    Example:
    leanmoe study -o runs/study
    """
    from leanmoe.report.write import write_page
    from leanmoe.study.run import PAGE
    from leanmoe.study.run import study as run

    results = run(settings, output, command_line())
    write_page(output, output / PAGE)
    if as_json:
        print_json(results.to_json())
        return
    _show(results)
    print(f"The page: {output / PAGE}")


def _show(results: StudyResults) -> None:
    console = make_console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("claim", "the paper", "ours", "verdict"):
        table.add_column(heading, vertical="top")
    for claim in results.claims:
        table.add_row(claim.claim, claim.paper, claim.ours, claim.verdict)
    console.print(table)
    console.print(
        "DeepSeek-V3, 8 H200: gain of k = 6 and 4, modelled (cited): "
        + "; ".join(
            f"{row.concurrency}: {row.gain['6']:+.1f} ({row.paper_gain['6']:+.1f}) and "
            f"{row.gain['4']:+.1f} ({row.paper_gain['4']:+.1f})"
            for row in results.table_9.rows
        )
    )
