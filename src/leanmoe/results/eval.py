"""Reads the results of `leanmoe eval` and refuses those that this version cannot show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json

SCHEMA_VERSION = 1


def read_evaluation(path: Path) -> dict[str, Any]:
    """The results of `leanmoe eval`, with their schema version checked."""
    found = read_json(path, "results of eval")
    version = found.get("leanmoe_eval") if isinstance(found, dict) else None
    if version != SCHEMA_VERSION:
        raise LeanMoeError(
            f"results of eval {path} have schema version {version!r}: this leanmoe reads "
            f"{SCHEMA_VERSION}"
        )
    return dict(found)
