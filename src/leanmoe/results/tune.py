"""Reads a run's results.json and refuses one that this version cannot show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json

SCHEMA_VERSION = 1
SECTIONS = ("provenance", "model", "settings", "text", "profile", "fronts", "verdicts")

Results = dict[str, Any]


def read_results(path: Path) -> Results:
    """The results of a tune run, with its schema version and sections checked."""
    results = read_json(path, "results")
    version = results.get("leanmoe_results") if isinstance(results, dict) else None
    if version != SCHEMA_VERSION:
        raise LeanMoeError(
            f"results {path} has schema version {version!r}: this leanmoe reads {SCHEMA_VERSION}"
        )
    missing = [section for section in SECTIONS if section not in results]
    if missing:
        raise LeanMoeError(f"results {path} is incomplete: {missing[0]} is missing; run tune again")
    return dict(results)


def percent(share: float, digits: int = 2) -> str:
    """0.0123 -> "+1.23%": relative changes keep their sign."""
    return f"{100 * share:+.{digits}f}%"


def describe_rule(rule: dict[str, Any]) -> str:
    """A rule in the words of the plan's fields, short enough for a cell of a heat map."""
    if not rule:
        return "full"
    parts = []
    if "experts" in rule:
        parts.append(f"{len(rule['experts'])} experts")
    for name, text in (
        ("top_k", "top_k {}"),
        ("threshold", "threshold {:.2g}"),
        ("top_p", "top_p {:.3g}"),
        ("guaranteed", "guaranteed {}"),
        ("budget", "budget {}"),
        ("budget_per_rank", "budget a rank {}"),
    ):
        if name in rule:
            parts.append(text.format(rule[name]))
    if rule.get("keep_weights"):
        parts.append("weights kept")
    return ", ".join(parts)
