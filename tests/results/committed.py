"""The results files that are committed, by the key that holds their schema version."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results"


def committed(kind: str) -> list[Path]:
    """The committed results files of one kind."""
    return [path for path in sorted(FOLDER.glob("*.json")) if kind in json.loads(path.read_text())]
