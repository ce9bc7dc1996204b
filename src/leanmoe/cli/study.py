"""`leanmoe study`: the paper's study, rerun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from leanmoe.cli.options import AsJson, Output, make_console, print_json
from leanmoe.cli.verb import command_line
from leanmoe.study.settings import StudySettings


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

    quality = _quality(settings, output)
    results = run(output, quality, command_line(), settings.seed, settings.tuned)
    write_page(output, output / PAGE)
    if as_json:
        print_json(results)
        return
    _show(results)
    print(f"The page: {output / PAGE}")


def _quality(settings: StudySettings, output: Path) -> dict[str, Any] | None:
    """The study's section on quality: measured now, read from an earlier study, or none."""
    if settings.quality == "none":
        return None
    if settings.quality == "measured":
        from leanmoe.study.quality import QualitySettings, saved_quality

        measured = QualitySettings(
            settings.model, settings.text, quick=settings.quick, seed=settings.seed
        )
        return saved_quality(measured, output)
    from leanmoe.study.run import earlier_quality

    return earlier_quality(Path(settings.quality))


def _show(results: dict[str, Any]) -> None:
    console = make_console()
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
