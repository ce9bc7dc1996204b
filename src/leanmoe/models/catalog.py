"""Published models that the study speaks of: what of each config.json says its shape.

Facts from the models' public config.json files; leanmoe can be run on any other config.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError, did_you_mean, unknown_name
from leanmoe.models.shape import MoEShape, read_shape

CONFIGS: Mapping[str, Mapping[str, Any]] = json.loads(
    (Path(__file__).parent / "published_configs.json").read_text(encoding="utf-8")
)


def published_shape(name: str) -> MoEShape:
    """One of `CONFIGS` by its name; raises LeanMoeError that lists them for another name."""
    if name not in CONFIGS:
        raise unknown_name("published model", name, CONFIGS)
    return read_shape(CONFIGS[name], name)


def find_shape(name: str) -> MoEShape:
    """A model by name: a published one by its facts here, else by its config.json.

    Raises LeanMoeError as `read_shape` does, with the published names that are near.
    """
    if name in CONFIGS and not Path(name).exists():
        print(f"leanmoe: {name}'s shape is known here; nothing is fetched", file=sys.stderr)
        return published_shape(name)
    try:
        return read_shape(name)
    except LeanMoeError as error:
        near = "" if Path(name).exists() else did_you_mean(name, CONFIGS).strip()
        raise LeanMoeError(f"{error}; {near}" if near else str(error)) from error
