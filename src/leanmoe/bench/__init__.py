"""What a plan gains: service load in process and against servers, full model and plans in turn.

The public names load on first use: the settings of a bench need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leanmoe.bench.measure import Comparison, Variant, compare
    from leanmoe.bench.metrics import ClosedLoop, Measurement, Ratio, Timeline

__all__ = ["ClosedLoop", "Comparison", "Measurement", "Ratio", "Timeline", "Variant", "compare"]
_MEASURE = {"Comparison", "Variant", "compare"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'leanmoe.bench' has no attribute {name!r}")
    from importlib import import_module

    module = "measure" if name in _MEASURE else "metrics"
    return getattr(import_module(f"leanmoe.bench.{module}"), name)
