"""leanmoe makes mixture-of-experts language models faster by running fewer experts.

It finds the setting, proves what it costs, and runs it. The public names load on first use, so
that `import leanmoe` needs neither torch nor an engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Band, Plan, Rule

if TYPE_CHECKING:
    from leanmoe.runtime import apply

__all__ = ["Band", "LeanMoeError", "Plan", "Rule", "apply"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "apply":
        from leanmoe.runtime import apply

        return apply
    raise AttributeError(f"module 'leanmoe' has no attribute {name!r}")
