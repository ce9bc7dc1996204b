"""`leanmoe predict`: what a plan would gain on hardware that one does not have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from leanmoe.cli.options import AsJson, make_console, print_json
from leanmoe.core.errors import LeanMoeError
from leanmoe.predict.settings import PredictSettings


def predict(
    settings: PredictSettings,
    page: Annotated[Path | None, typer.Option(help="A file to write a sweep's page to.")] = None,
    as_json: AsJson = False,
) -> None:
    """Predict throughput, latency and memory, with and without a plan, and what bounds them.

    Example:
    leanmoe predict deepseek-ai/DeepSeek-V3 --top-k 6 --gpus 8 --concurrency 1,32
    """
    from leanmoe.predict.run import predict as run

    if page is not None and not settings.sweep:
        raise LeanMoeError("--page, --tpot, --ttft and --price go with --sweep")
    results = run(settings)
    if page is not None and results.sweep is not None:
        from leanmoe.core.files import write_text
        from leanmoe.report.predict_page import predict_page
        from leanmoe.results.predict import SweepResults

        write_text(page, predict_page(SweepResults.from_json(results.sweep)))
    if as_json:
        print_json(results.to_json())
    elif results.sweep is None:
        _show(results.predictions)
    else:
        _show_sweep(results.sweep, page)


def _show(predictions: Sequence[Any]) -> None:
    console = make_console()
    first = predictions[0]
    memory = first.full.memory
    console.print(
        f"{first.model.name} on {first.deployment}: {_gigabytes(memory.weights)} of weights "
        f"on each GPU, {_gigabytes(memory.cache)} left for the cache"
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    arrives = first.load.concurrency is None
    headings = [
        "load" if arrives else "at\nonce",
        "tok/s",
        "TTFT\nms",
        "TPOT\nms",
        "active\nexperts",
    ]
    planned = first.plan is not None
    kind = "plan\nTPOT" if arrives else "plan\ntok/s"
    headings += [kind, "plan\nactive", "gain"] if planned else []
    for heading in [*headings, "longest part"]:
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    for each in predictions:
        load = f"{each.load.rate:g}/s" if arrives else str(each.load.concurrency)
        tokens, tpot, active = _cells(each.full)
        row = [load, tokens, f"{1e3 * each.full.ttft:.0f}", tpot, active]
        if planned:
            tokens, tpot, active = _cells(each.plan)
            gain = each.tpot_gain if arrives else each.gain
            row += [tpot if arrives else tokens, active, f"{100 * (gain - 1):+.1f}%"]
        table.add_row(*row, _longest(each.full))
    console.print(table)
    console.print("Modelled; active: distinct experts of a layer. It stands on:", style="dim")
    for name, words in first.stands_on.items():
        console.print(f"  {name}: {words}", style="dim")


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e9:.2g} GB"


def _cells(side: Any) -> list[str]:
    return [f"{side.throughput:.0f}", f"{1e3 * side.tpot:.3g}", f"{side.distinct:.0f}"]


def _longest(side: Any) -> str:
    """The longest part of a decode step, and what bounds it."""
    step = side.served.step.to_json()
    name = max(step, key=lambda part: step[part])
    share = step[name] / sum(step.values())
    return f"{name} {share:.0%}, {side.bounds.get(name, 'latency')}"


def _show_sweep(results: dict[str, Any], page: Path | None) -> None:
    console = make_console()
    console.print(
        f"{results['configurations']} configurations of {results['model']} on {results['gpu']} in "
        f"{results['seconds']:.1f} s ({results['how']}); {len(results['refused'])} splits do not "
        "fit (--json says why)"
    )
    for name, points in results["fronts"].items():
        console.print(f"\n{name}: nothing is better in both", style="bold")
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for heading in ("deployment", "at once", "tok/s\na user", "tok/s\na GPU", "TTFT ms"):
            table.add_column(heading, justify="right", vertical="bottom")
        for point in points:
            figures = (point["per_user"], point["per_gpu"], point["ttft_ms"])
            table.add_row(
                _place(point), str(point["concurrency"]), *(f"{value:.1f}" for value in figures)
            )
        console.print(table)
    for row in results["cheapest"]:
        console.print(_cheapest_line(row))
    if page is not None:
        console.print(f"The page: {page}")


def _place(point: dict[str, Any]) -> str:
    parts = {"TP": "tensor", "EP": "expert", "DP": "data", "PP": "pipeline"}
    named = [f"{k}{point[v]}" for k, v in parts.items() if point[v] > 1 or k == "TP"]
    return f"{point['gpus']} GPUs, {' '.join(named)}"


def _cheapest_line(row: dict[str, Any]) -> str:
    point = row["point"]
    if point is None:
        return f"Cheapest, {row['plan']}: no configuration meets the limits"
    words = (
        f"Cheapest, {row['plan']}: {_place(point)}, {point['concurrency']} at once, "
        f"{point['per_gpu']:.0f} tok/s a GPU at {point['tpot_ms']:.1f} ms a token"
    )
    if "cost_a_million" in row:
        words += f", {row['cost_a_million']:.2f} a million tokens"
    if row.get("gpus_saved"):
        full = row["gpus"] + row["gpus_saved"]
        words += f"; {row['gpus']} GPUs make the tokens that take the full model {full}"
    return words
