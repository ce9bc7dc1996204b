"""The results files that are committed, by the key that holds their schema version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results"


def committed(kind: str) -> list[Path]:
    """The committed results files of one kind."""
    return [path for path in sorted(FOLDER.glob("*.json")) if kind in json.loads(path.read_text())]


def content(path: Path) -> Any:
    """A file's JSON; `keep_weights`, of before `renormalise`, and plans of schema 1 as of today."""
    text = path.read_text().replace('"keep_weights": true', '"renormalise": 0.0')
    return json.loads(text, object_hook=_plan_of_today)


def _plan_of_today(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("leanmoe_plan") != 1:
        return value
    level = {"name": "lean", "bands": value.pop("bands"), "prompt": value.pop("prompt", [])}
    return {**value, "leanmoe_plan": 2, "levels": [level]}


def without_nulls(value: Any) -> Any:
    """JSON values without the fields that are null: an optional field may be absent or null."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list | tuple) else value
