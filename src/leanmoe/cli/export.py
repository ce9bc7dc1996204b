"""`leanmoe export`: what an engine needs to run a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leanmoe.cli.options import AsJson, print_json
from leanmoe.core.files import write_text
from leanmoe.plan import Plan
from leanmoe.serve.settings import ExportSettings


def export(
    settings: ExportSettings,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A file to write to; by default it is printed."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say how to run a plan in an engine, and which parts of it that engine cannot run.

    Example:
    leanmoe export plan.json --engine sglang --model Qwen/Qwen3-30B-A3B
    """
    from leanmoe.serve.export import export as recipe_for

    plan = Plan.load(settings.plan)
    recipe = recipe_for(
        plan,
        settings.plan,
        settings.engine,
        settings.model,
        settings.drop,
        settings.gguf_arch,
        settings.level,
    )
    if output is not None:
        write_text(output, recipe.text() + "\n")
    if as_json:
        print_json(recipe.to_json() if output is None else {"output": str(output)})
    else:
        print(output or recipe.text())
