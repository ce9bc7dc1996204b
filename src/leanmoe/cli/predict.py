"""`leanmoe predict`: what a plan would gain on hardware that one does not have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from leanmoe.cli.options import AsJson, make_console, print_json
from leanmoe.core.errors import LeanMoeError
from leanmoe.predict.settings import SWEEPS_ALONE, PredictSettings

if TYPE_CHECKING:
    from leanmoe.predict.prediction import PredictedVariant, Prediction
    from leanmoe.results.predict import CheapestPoint, SweepResults

SweepOutput = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="A folder for a sweep's results and page, or the page's file: PAGE.html.",
    ),
]


def predict(settings: PredictSettings, output: SweepOutput = None, as_json: AsJson = False) -> None:
    """Predict throughput, latency and memory, with and without a plan, and what bounds them.

    Example:
    leanmoe predict deepseek-ai/DeepSeek-V3 --top-k 6 --gpus 8 --concurrency 1,32
    """
    from leanmoe.predict.run import predict as run

    if output is not None and not settings.sweep:
        raise LeanMoeError(SWEEPS_ALONE)
    results = run(settings)
    page = None
    if output is not None and results.sweep is not None:
        page = _write(results.sweep, output)
    if as_json:
        print_json(results.to_json())
    elif results.sweep is None:
        _show(results.predictions)
    else:
        _show_sweep(results.sweep, page)


def _write(results: SweepResults, output: Path) -> Path:
    """Writes the results and their page, or the page alone; returns where the page is."""
    from leanmoe.core.files import write_text
    from leanmoe.report.write import PAGE, page_of

    page = output
    if output.suffix != ".html":
        results.save(output / "results.json")
        page = output / PAGE
    write_text(page, page_of(results, output))
    return page


def _show(predictions: Sequence[Prediction]) -> None:
    console = make_console()
    first = predictions[0]
    memory = first.full.memory
    console.print(
        f"{first.model} on {first.deployment}: {_gigabytes(memory.weights)} of weights "
        f"on each GPU, {_gigabytes(memory.cache)} left for the cache"
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    arrives = first.concurrency is None
    headings = [
        "load" if arrives else "con-\ncurrency",
        "tok/s",
        "TTFT\nms",
        "TPOT\nms",
        "active\nexperts",
    ]
    kind = "plan\nTPOT" if arrives else "plan\ntok/s"
    headings += [kind, "plan\nactive", "gain"] if first.plan else []
    for heading in [*headings, "longest part"]:
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    for each in predictions:
        load = f"{each.rate:g}/s" if arrives else str(each.concurrency)
        tokens, tpot, active = _cells(each.full)
        row = [load, tokens, f"{each.full.ttft_ms:.0f}", tpot, active]
        if each.plan is not None:
            tokens, tpot, active = _cells(each.plan)
            gain = (each.tpot_gain if arrives else each.gain) or 1.0
            row += [tpot if arrives else tokens, active, f"{100 * (gain - 1):+.1f}%"]
        table.add_row(*row, _longest(each.full))
    console.print(table)
    console.print("Modelled; active: distinct experts of a layer. It stands on:", style="dim")
    for name, words in first.stands_on.items():
        console.print(f"  {name}: {words}", style="dim")


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e9:.2g} GB"


def _cells(side: PredictedVariant) -> list[str]:
    return [f"{side.output_throughput:.0f}", f"{side.tpot_ms:.3g}", f"{side.distinct:.0f}"]


def _longest(side: PredictedVariant) -> str:
    """The longest part of a decode step, and what bounds it."""
    step = side.step_ms
    name = max(step, key=lambda part: step[part])
    share = step[name] / sum(step.values())
    return f"{name} {share:.0%}, {side.bounds.get(name, 'latency')}"


def _show_sweep(results: SweepResults, page: Path | None) -> None:
    console = make_console()
    console.print(
        f"{results.configurations} configurations of {results.model} on {results.gpu} in "
        f"{results.seconds:.1f} s ({results.how}); {len(results.refused)} splits do not fit "
        "(--json says why)"
    )
    for name, points in results.fronts.items():
        console.print(f"\n{name}: nothing is better in both", style="bold")
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for heading in ("deployment", "concurrency", "tok/s\na user", "tok/s\na GPU", "TTFT ms"):
            table.add_column(heading, justify="right", vertical="bottom")
        for point in points:
            figures = (point.per_user, point.per_gpu, point.ttft_ms)
            table.add_row(
                point.place, str(point.concurrency), *(f"{value:.1f}" for value in figures)
            )
        console.print(table)
    for row in results.cheapest:
        console.print(_cheapest_line(row))
    if page is not None:
        console.print(f"The page: {page}")


def _cheapest_line(row: CheapestPoint) -> str:
    point = row.point
    if point is None:
        return f"Cheapest, {row.plan}: no configuration meets the limits"
    words = (
        f"Cheapest, {row.plan}: {point.place}, concurrency {point.concurrency}, "
        f"{point.per_gpu:.0f} tok/s a GPU at {point.tpot_ms:.1f} ms a token"
    )
    if row.cost_a_million is not None:
        words += f", {row.cost_a_million:.2f} a million tokens"
    if row.gpus_saved and row.gpus:
        full = row.gpus + row.gpus_saved
        words += f"; {row.gpus} GPUs make the tokens that take the full model {full}"
    return words
