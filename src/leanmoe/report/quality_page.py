"""The page of an evaluation: every table, and how it was measured."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from leanmoe.core.files import write_text
from leanmoe.report.page import STYLE
from leanmoe.report.quality_tables import Sheet, sheets


def write_quality_page(results: dict[str, Any], target: Path) -> None:
    """Writes `target` from an evaluation's results alone."""
    write_text(target, quality_page(results))


def quality_page(results: dict[str, Any]) -> str:
    """The page as HTML; it needs no script and no network."""
    where = results["provenance"]
    name = escape(str(results["settings"]["model"]))
    facts = {
        "measured on": f"{where['hardware']}, {where['cores']} cores",
        "experts run by": results["experts_implementation"],
        "versions": ", ".join(f"{k} {v}" for k, v in where["versions"].items()),
        "commit": where["commit"],
        "date": where["date"],
        "seed": where["seed"],
        "command": where["command"],
    }
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
    body = "".join(_section(sheet) for sheet in sheets(results))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>leanmoe eval: {name}'
        '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main><h1>What plans cost: {name}</h1>"
        '<p class="lead">The same questions, prompts and texts under the full model and under each '
        f"plan.</p>{body}<section><h2>Provenance</h2><dl>{listed}</dl></section></main></body>"
        "</html>\n"
    )


def _section(sheet: Sheet) -> str:
    heads = "".join(f"<th>{escape(head)}</th>" for head in sheet.heads)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in sheet.rows
    )
    return (
        f'<section><h2>{escape(sheet.title)}<span class="label">measured</span></h2>'
        f"<p>{escape(sheet.note)}</p>"
        f'<div class="scroll"><table><tr>{heads}</tr>{rows}</table></div></section>'
    )
