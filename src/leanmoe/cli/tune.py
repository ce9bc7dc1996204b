"""`leanmoe tune`: a faster plan, what it costs, what it gains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from leanmoe.cli.options import AsJson, Output, Overwrite, make_console, print_json
from leanmoe.cli.verb import command_line
from leanmoe.core.files import read_json
from leanmoe.core.schema import to_json
from leanmoe.results.tune import PruneOrSkipRow, TuneResults, percent
from leanmoe.tune.settings import TuneSettings


def tune(
    settings: TuneSettings,
    output: Output = Path("runs/tune"),
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Find a faster plan for a model, prove what it costs, and measure what it gains.

    A run that was stopped goes on where it was.

    Example:
    leanmoe tune reference --concurrency 1,8,32 --margins 0.5%,1% -o runs/demo
    """
    from leanmoe.report.write import write_page
    from leanmoe.tune.run import tune as run_tune

    results = run_tune(settings, output, command_line(), overwrite)
    write_page(output)
    if as_json:
        plan = read_json(output / "plan.json", "plan")
        print_json({"run": str(output), "verdicts": to_json(results.verdicts), "plan": plan})
        return
    show(results, output)


def show(results: TuneResults, folder: Path) -> None:
    """Prints the verdict of a run as a table."""
    from leanmoe.report.tune_page import headline

    console = make_console()
    sure = f"{100 * results.confidence:g}%"
    table = Table(title="Verdict per load", title_justify="left")
    for name in ("level", "concurrency"):
        table.add_column(name, justify="right")
    table.add_column("runs")
    heads = ("loss", f"at most ({sure})", "throughput", f"interval ({sure})", "per request")
    for name in heads:
        table.add_column(name, justify="right")
    for verdict in results.verdicts:
        loss, gain = verdict.loss, verdict.gain
        table.add_row(
            verdict.level,
            str(verdict.concurrency),
            Text(results.at_work(verdict), "green" if verdict.accepted else ""),
            percent(loss.ratio) if loss else "",
            percent(loss.upper_bound) if loss else "",
            percent(gain.median - 1, 1) if gain else "",
            f"{percent(gain.low - 1, 1)} to {percent(gain.high - 1, 1)}" if gain else "",
            percent(verdict.per_request.ratio - 1, 1) if verdict.per_request else "",
        )
    console.print(table)
    if results.total_or_activated:
        console.print(_totals(results.total_or_activated))
    if results.text.kinds:
        console.print(_kinds(results))
    for verdict in results.verdicts:
        console.print(
            f"Level {verdict.level}, concurrency {verdict.concurrency}: {verdict.reason}."
        )
    console.print()
    console.print(headline(results))
    console.print(f"Plan: {folder / 'plan.json'}   Page: {folder / 'report.html'}")


def _kinds(results: TuneResults) -> Table:
    table = Table(title="Loss by kind of text", title_justify="left")
    for name in (
        "level",
        "concurrency",
        "kind",
        "loss",
        "at most",
        "KL",
        "tokens changed",
        "worst tenth",
    ):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for verdict in results.verdicts:
        for each in verdict.kinds:
            bound = percent(each.loss.upper_bound)
            table.add_row(
                verdict.level,
                str(verdict.concurrency),
                each.kind,
                percent(each.loss.ratio),
                Text(bound, "" if each.accepted else "red"),
                f"{each.divergence:.4f}",
                f"{each.flips:.1%}",
                percent(each.worst_tenth),
            )
    return table


def _totals(rows: Sequence[PruneOrSkipRow]) -> Table:
    table = Table(title="Fewer experts in total, or a token, where as fast", title_justify="left")
    for name in ("concurrency", "budget", "way", "memory", "time in experts", "loss", "verdict"):
        table.add_column(name, justify="left" if name in ("way", "verdict") else "right")
    for row in rows:
        loss = row.loss
        table.add_row(
            str(row.concurrency),
            row.budget,
            row.way,
            f"{row.memory:.0%}",
            f"{row.time:.0%}",
            f"{percent(loss.ratio)} [{percent(loss.low)}, {percent(loss.high)}]",
            row.against.verdict if row.against else "",
        )
    return table
