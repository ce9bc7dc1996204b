"""`leanmoe inspect`: what a model is, and what fewer experts could gain, from config.json alone."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from leanmoe.errors import LeanMoeError
from leanmoe.shape import MoEShape, distinct_uniform, read_shape

BATCHES = "1,2,4,8,16,32,64,128,256,512,1024"


def inspect(
    model: Annotated[
        str, typer.Argument(help="A folder, a config.json, a hub name, or 'reference'.")
    ] = "reference",
    batch_sizes: Annotated[
        str, typer.Option(help="Tokens in a decode step, comma separated.")
    ] = BATCHES,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Shows layers, experts, sizes and the ideal gain at lower k. No weights are read.

    Example: leanmoe inspect deepseek-ai/DeepSeek-V3
    """
    shape = read_shape(model)
    summary = {**_facts(shape), "table": _rows(shape, _numbers(batch_sizes))}
    if as_json:
        print(json.dumps(summary, indent=1))
        return
    console = Console()
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(shape).items():
        facts.add_row(f"[dim]{name.replace('_', ' ')}[/dim]", _shown(name, value))
    console.print(facts)
    console.print(_table(shape, summary["table"]))
    console.print(
        "[dim]Modelled: uniform routing, weights read once a step, KV cache not counted. Holds "
        "while decoding is bound by memory; real routing wakes fewer experts (leanmoe tune "
        "measures it).[/dim]"
    )


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise LeanMoeError(f"batch-sizes is {text!r}: it must be numbers like 1,8,32") from error
    if min(numbers) < 1:
        raise LeanMoeError(f"batch-sizes holds {min(numbers)}: every size must be 1 or more")
    return numbers


def _facts(shape: MoEShape) -> dict[str, Any]:
    router = shape.router
    return {
        "architecture": shape.architecture,
        "layers": shape.layers,
        "moe_layers": len(shape.moe_layers),
        "experts": shape.experts,
        "top_k": shape.top_k,
        "shared_experts": shape.shared_experts,
        "groups": f"{router.groups_used} of {router.groups}" if router.groups > 1 else "none",
        "scoring": router.scoring + (", ranking bias" if router.ranking_bias else ""),
        "hidden": shape.hidden,
        "expert_width": shape.expert_width,
        "expert_bytes": shape.expert_bytes,
        "parameters": shape.total_parameters(),
        "active_parameters": shape.active_parameters(),
    }


def _lower(shape: MoEShape) -> list[int]:
    return sorted({max(1, round(shape.top_k * share)) for share in (0.75, 0.5, 0.25)}, reverse=True)


def _rows(shape: MoEShape, batches: list[int]) -> list[dict[str, Any]]:
    rows = []
    for tokens in batches:
        full = distinct_uniform(shape.experts, shape.top_k, tokens)
        needed = shape.decode_bytes(full)
        gains = {
            k: needed / shape.decode_bytes(distinct_uniform(shape.experts, k, tokens))
            for k in _lower(shape)
            if k < shape.top_k
        }
        rows.append({"tokens": tokens, "distinct": full, "bytes": needed, "ideal_gain": gains})
    return rows


def _table(shape: MoEShape, rows: list[dict[str, Any]]) -> Table:
    table = Table(title="A decode step, ideally", title_justify="left")
    for name in ("tokens", "distinct experts", "bytes read"):
        table.add_column(name, justify="right")
    for k in rows[0]["ideal_gain"]:
        table.add_column(f"gain at k={k}", justify="right")
    for row in rows:
        gains = [f"{100 * (gain - 1):+.0f}%" for gain in row["ideal_gain"].values()]
        distinct = f"{row['distinct']:.1f} of {shape.experts}"
        table.add_row(str(row["tokens"]), distinct, _bytes(row["bytes"]), *gains)
    return table


def _shown(name: str, value: Any) -> str:
    if name == "expert_bytes":
        return _bytes(value)
    if name.endswith("parameters"):
        return f"{value / 1e9:.2f} B" if value >= 1e9 else f"{value / 1e6:.1f} M"
    return str(value)


def _bytes(count: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
