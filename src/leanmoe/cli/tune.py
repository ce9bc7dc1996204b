"""`leanmoe tune`: the main job from the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from leanmoe.cli.options import AsJson, Dtype, Model, Overwrite, RunOutput, Seed, TrustRemoteCode
from leanmoe.core.files import read_json
from leanmoe.core.parsing import parse_counts, parse_share
from leanmoe.core.schema import to_json
from leanmoe.results.tune import PruneOrSkipRow, TuneResults, percent
from leanmoe.tune.settings import TuneSettings

_DEFAULT = TuneSettings(model="reference")


def tune(
    model: Model,
    output: RunOutput = Path("runs/tune"),
    text: Annotated[
        str | None,
        typer.Option(help="A .txt or .jsonl file, a folder, or a Hugging Face data set."),
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Requests at once, comma separated.")] = ",".join(
        map(str, _DEFAULT.concurrency)
    ),
    margin: Annotated[
        str, typer.Option(help="Largest increase in next-token loss to accept.")
    ] = f"{100 * _DEFAULT.margin:g}%",
    confidence: Annotated[float, typer.Option(help="Of every claim.")] = _DEFAULT.confidence,
    strategy: Annotated[
        str,
        typer.Option(
            help="'auto': leanmoe's own, compared with every other; or one of them by its name."
        ),
    ] = _DEFAULT.strategy,
    keep: Annotated[
        str | None,
        typer.Option(help="A memory budget: the share or number of experts a plan may use."),
    ] = None,
    criterion: Annotated[
        str, typer.Option(help="How experts are ranked for --keep; see leanmoe prune.")
    ] = _DEFAULT.criterion,
    input_len: Annotated[int, typer.Option(help="Prompt length.")] = _DEFAULT.input_len,
    output_len: Annotated[int, typer.Option(help="Output length.")] = _DEFAULT.output_len,
    repeats: Annotated[int, typer.Option(help="Of each throughput run.")] = _DEFAULT.repeats,
    profile_tokens: Annotated[
        int, typer.Option(help="Tokens of calibration text that the profile reads.")
    ] = _DEFAULT.profile_tokens,
    sensitivity_tokens: Annotated[
        int, typer.Option(help="Tokens of calibration text for each candidate rule.")
    ] = _DEFAULT.sensitivity_tokens,
    heldout_tokens: Annotated[
        int, typer.Option(help="Tokens of held-out text that plans are proven on.")
    ] = _DEFAULT.heldout_tokens,
    seed: Seed = _DEFAULT.seed,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Finds a faster plan for a model, proves what it costs, measures what it gains.

    A run that was stopped goes on where it was.

    Example:
    leanmoe tune reference --concurrency 1,8,32 --margin 0.5% -o runs/demo
    """
    settings = TuneSettings(
        model=model,
        text=text,
        concurrency=parse_counts("--concurrency", concurrency),
        margin=parse_share("--margin", margin),
        confidence=confidence,
        strategy=strategy,
        keep=keep,
        criterion=criterion,
        input_len=input_len,
        output_len=output_len,
        repeats=repeats,
        profile_tokens=profile_tokens,
        sensitivity_tokens=sensitivity_tokens,
        heldout_tokens=heldout_tokens,
        seed=seed,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    settings.check()
    from leanmoe.report.write import write_page
    from leanmoe.tune.run import tune as run_tune

    command = "leanmoe " + " ".join(sys.argv[1:])
    folder = run_tune(settings, output, command, overwrite)
    results = TuneResults.read(folder / "results.json")
    write_page(folder)
    if as_json:
        plan = read_json(folder / "plan.json", "plan")
        print(json.dumps({"run": str(folder), "verdicts": to_json(results.verdicts), "plan": plan}))
        return
    show(results, folder)


def show(results: TuneResults, folder: Path) -> None:
    """Prints the verdict of a run as a table."""
    from leanmoe.report.tune_page import headline

    console = Console()
    sure = f"{100 * results.confidence:g}%"
    table = Table(title="Verdict per load", title_justify="left")
    table.add_column("concurrency", justify="right")
    table.add_column("runs")
    for name in ("loss", f"at most ({sure})", "throughput", f"interval ({sure})"):
        table.add_column(name, justify="right")
    for verdict in results.verdicts:
        loss, gain = verdict.loss, verdict.gain
        table.add_row(
            str(verdict.concurrency),
            "[green]the plan[/green]" if verdict.accepted else "full model",
            percent(loss.ratio) if loss else "",
            percent(loss.upper_bound) if loss else "",
            percent(gain.median - 1, 1) if gain else "",
            f"{percent(gain.low - 1, 1)} to {percent(gain.high - 1, 1)}" if gain else "",
        )
    console.print(table)
    if results.total_or_activated:
        console.print(_totals(results.total_or_activated))
    for verdict in results.verdicts:
        console.print(f"Concurrency {verdict.concurrency}: {verdict.reason}.", highlight=False)
    console.print()
    console.print(headline(results))
    console.print(f"Plan: {folder / 'plan.json'}   Page: {folder / 'report.html'}")


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
