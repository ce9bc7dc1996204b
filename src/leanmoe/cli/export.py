"""`leanmoe export`: what an engine needs to run a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from leanmoe.core.files import write_text
from leanmoe.plan import Plan
from leanmoe.serve.export import ENGINES
from leanmoe.serve.export import export as recipe_for


def export(
    plan: Annotated[Path, typer.Argument(help="A plan.json.")],
    engine: Annotated[str, typer.Option(help=", ".join(ENGINES) + ".")] = "vllm",
    model: Annotated[str, typer.Option(help="A folder or hub name, for the command.")] = "MODEL",
    drop: Annotated[
        list[str] | None,
        typer.Option(help="A part of the plan to leave out: prompt. May be repeated."),
    ] = None,
    gguf_arch: Annotated[
        str | None, typer.Option(help="llama.cpp's name of the model's architecture.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write it to a file instead.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Say how to run a plan in an engine, and which parts of it that engine cannot honour.

    Example:
    leanmoe export plan.json --engine sglang --model Qwen/Qwen3-30B-A3B
    """
    recipe = recipe_for(Plan.load(plan), plan, engine, model, drop or [], gguf_arch)
    if output is not None:
        write_text(output, recipe.text() + "\n")
        print(json.dumps({"output": str(output)}) if as_json else output)
        return
    print(json.dumps(recipe.to_json()) if as_json else recipe.text())
