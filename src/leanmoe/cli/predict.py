"""`leanmoe predict`: what a plan would gain on hardware that one does not have."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.parsing import parse_counts


class ScopeChoice(StrEnum):
    """Whose tokens a rule sees with data parallelism."""

    RANK = "rank"
    ALL = "all"


CONCURRENCIES = "1,2,4,8,16,32,64,128,256,512"
SWEPT = ",".join(str(2**n) for n in range(15))


def predict(
    model: Annotated[
        str, typer.Argument(help="A folder, a config.json, owner/name on the Hub, or 'reference'.")
    ],
    plan: Annotated[Path | None, typer.Option(help="A plan.json, as leanmoe tune writes.")] = None,
    top_k: Annotated[int | None, typer.Option(help="In place of a plan: so many a token.")] = None,
    guaranteed: Annotated[
        int | None, typer.Option(help="In place of a plan: k0, the rest from the step's own.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="A known GPU, or a JSON file that says one.")] = "h200",
    gpus: Annotated[
        str | None,
        typer.Option(help="How many; with --sweep several, like 8,16,64. Default: what it takes."),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(help="GPUs of tensor parallelism.")
    ] = None,
    expert_parallel_size: Annotated[
        int, typer.Option(help="GPUs that share the experts whole.")
    ] = 1,
    data_parallel_size: Annotated[int, typer.Option(help="Copies of attention.")] = 1,
    pipeline_parallel_size: Annotated[int, typer.Option(help="Stages of layers.")] = 1,
    batch_scope: Annotated[
        ScopeChoice,
        typer.Option(
            help="Whose tokens share experts, with --data-parallel-size: their rank's, or all."
        ),
    ] = ScopeChoice.RANK,
    concurrency: Annotated[
        str | None, typer.Option(help=f"Requests at once, comma separated; {CONCURRENCIES}.")
    ] = None,
    request_rate: Annotated[
        float | None, typer.Option(help="Requests a second, arriving at random (Poisson).")
    ] = None,
    input_len: Annotated[
        str, typer.Option(help="Prompt tokens: 1024, 512:2048, 1024~0.8 (log-normal), or a file.")
    ] = "1024",
    output_len: Annotated[str, typer.Option(help="Reply tokens, likewise.")] = "1024",
    kernel: Annotated[
        str | None, typer.Option(help="Whose experts kernel; the error lists them.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="A folder with profile.json: real routing, replayed.")
    ] = None,
    skew: Annotated[
        float, typer.Option(help="Without a profile: popularity of experts as rank^-skew.")
    ] = 0.0,
    agreement: Annotated[
        float, typer.Option(help="Without a profile: 0 to 1, how far tokens share their groups.")
    ] = 0.0,
    constants: Annotated[
        Path | None, typer.Option(help="Of your own GPU, from leanmoe calibrate.")
    ] = None,
    communication: Annotated[
        Path | None,
        typer.Option(help="Between your own GPUs, from benchmarks/predict/communication.py."),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Compare every split of --gpus at every load.")
    ] = False,
    tpot: Annotated[float | None, typer.Option(help="Sweep: most ms a token.")] = None,
    ttft: Annotated[float | None, typer.Option(help="Sweep: most ms to the first token.")] = None,
    price: Annotated[float | None, typer.Option(help="Sweep: of a GPU and hour.")] = None,
    page: Annotated[Path | None, typer.Option(help="Sweep: write a page here.")] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and lengths.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Predict throughput, latency and memory, with and without a plan, and what bounds them.

    Example:
    leanmoe predict deepseek-ai/DeepSeek-V3 --top-k 6 --gpus 8 --concurrency 1,32
    """
    from leanmoe.models.catalog import find_shape
    from leanmoe.predict.constants import find_constants
    from leanmoe.predict.experts.assumed import Assumed
    from leanmoe.predict.experts.curve_sources import find_curves
    from leanmoe.predict.hardware.gpus import read_gpu
    from leanmoe.predict.inputs import find_plan
    from leanmoe.predict.prediction import default_kernel
    from leanmoe.predict.prediction import predict as predicted
    from leanmoe.predict.step.deployment import find_deployment
    from leanmoe.predict.traffic.service_load import ServiceLoadModel, read_lengths
    from leanmoe.predict.traffic.sweep import Limits

    found = find_shape(model)
    machine = read_gpu(gpu)
    own = find_constants(constants, communication, machine)
    assumed = Assumed(skew, agreement)
    chosen = find_plan(found, plan, top_k, guaranteed)
    curves = find_curves(found, chosen, profile, assumed)
    lengths = read_lengths(input_len, "--input-len"), read_lengths(output_len, "--output-len")
    if request_rate is not None and (concurrency is not None or sweep):
        raise LeanMoeError("--request-rate goes with neither --concurrency nor --sweep")
    counts = None if gpus is None else parse_counts("--gpus", gpus)
    if sweep:
        from leanmoe.predict.traffic.sweep_results import sweep_results

        results = sweep_results(
            found,
            {} if chosen is None else {"plan": chosen},
            machine,
            list(counts or [8]),
            ServiceLoadModel(*lengths, concurrency=1),
            list(parse_counts("--concurrency", concurrency or SWEPT)),
            own,
            kernel or default_kernel(found),
            curves,
            Limits(tpot, ttft, price),
            batch_scope is ScopeChoice.ALL,
        )
        _show_sweep(results, page, as_json)
        return
    if page is not None or price is not None or tpot is not None or ttft is not None:
        raise LeanMoeError("--page, --price, --tpot and --ttft go with --sweep")
    if counts is not None and len(counts) != 1:
        raise LeanMoeError(f"--gpus is {gpus!r}: several numbers go with --sweep")
    place = find_deployment(
        found,
        machine,
        counts[0] if counts else None,
        tensor_parallel_size,
        expert_parallel_size,
        data_parallel_size,
        pipeline_parallel_size,
    )
    sizes = (
        [None]
        if request_rate is not None
        else [*parse_counts("--concurrency", concurrency or CONCURRENCIES)]
    )
    predictions = [
        predicted(
            found,
            chosen,
            place,
            ServiceLoadModel(*lengths, size, request_rate),
            kernel,
            None,
            curves,
            own,
            seed=seed,
            cross_rank=batch_scope is ScopeChoice.ALL,
        )
        for size in sizes
    ]
    if as_json:
        print(json.dumps([each.to_json() for each in predictions]))
        return
    _show(predictions)


def _show(predictions: list[Any]) -> None:
    console = Console(highlight=False)
    first = predictions[0]
    memory = first.full.memory
    console.print(
        f"{first.model.name} on {first.deployment}: {_gigabytes(memory.weights)} of weights "
        f"on each GPU, {_gigabytes(memory.cache)} left for the cache"
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    arrives = first.load.concurrency is None
    headings = ["load" if arrives else "at\nonce", "tok/s", "TTFT\nms", "TPOT\nms", "awake"]
    planned = first.plan is not None
    kind = "plan\nTPOT" if arrives else "plan\ntok/s"
    headings += [kind, "plan\nawake", "gain"] if planned else []
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
    console.print("Modelled; awake: distinct experts of a layer. It stands on:", style="dim")
    for name, words in first.stands_on.items():
        console.print(f"  {name}: {words}", style="dim")


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e9:.2g} GB"


def _cells(found: Any) -> list[str]:
    return [f"{found.throughput:.0f}", f"{1e3 * found.tpot:.3g}", f"{found.distinct:.0f}"]


def _longest(found: Any) -> str:
    """The longest part of a decode step, and what bounds it."""
    step = found.served.step.to_json()
    name = max(step, key=lambda part: step[part])
    share = step[name] / sum(step.values())
    return f"{name} {share:.0%}, {found.bounds.get(name, 'latency')}"


def _show_sweep(results: dict[str, Any], page: Path | None, as_json: bool) -> None:
    if page is not None:
        from leanmoe.core.files import write_text
        from leanmoe.report.predict_page import predict_page
        from leanmoe.results.predict import SweepResults

        write_text(page, predict_page(SweepResults.from_json(results)))
    if as_json:
        print(json.dumps(results))
        return
    console = Console(highlight=False)
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
