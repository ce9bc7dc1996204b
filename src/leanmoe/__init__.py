"""leanmoe makes mixture-of-experts language models faster by running fewer experts.

It finds the setting, proves what it costs, and runs it. The public names load on first use, so
that `import leanmoe` needs neither torch nor an engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Band, Level, Plan, Rule

if TYPE_CHECKING:
    from leanmoe.api import bench, evaluate, predict, prune, tune
    from leanmoe.runtime import apply

__all__ = [
    "Band",
    "LeanMoeError",
    "Level",
    "Plan",
    "Rule",
    "apply",
    "bench",
    "evaluate",
    "predict",
    "prune",
    "tune",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`apply` and the verbs; a verb that is a package, too, is the package, which can be called."""
    if name in ("bench", "predict", "prune", "tune"):
        return import_module(f"leanmoe.{name}")
    if name == "evaluate":
        return import_module("leanmoe.api").evaluate
    if name == "apply":
        return import_module("leanmoe.runtime").apply
    raise AttributeError(f"module 'leanmoe' has no attribute {name!r}")
