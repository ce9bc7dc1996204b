"""Which SGLang is installed here, and whether it can run a plan; SGLang itself is not imported."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec

from leanmoe.core.environment import PLAN
from leanmoe.core.errors import LeanMoeError

TESTED = "0.5.23"
"""The version that leanmoe's hook was written for and run with."""
PLUGINS = "sglang.srt.plugins"
"""The group of entry points by which SGLang finds leanmoe's plugin."""


def require_sglang(with_plans: bool) -> str:
    """The version of the SGLang that is installed.

    Raises LeanMoeError where there is none, and, `with_plans`, where it is another than the one
    tested or would not find leanmoe's plugin and so run the full model.
    """
    if find_spec("sglang") is None:
        raise LeanMoeError(
            "sglang is not installed: pip install --constraint constraints-sglang.txt sglang, or "
            "choose another --engine"
        )
    try:
        version = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        version = "unknown"
    if with_plans and version != TESTED:
        raise LeanMoeError(
            f"SGLang is {version}: a plan needs {TESTED}; unset {PLAN} to run the full model"
        )
    points = metadata.entry_points(group=PLUGINS)
    if with_plans and not any(point.value.startswith("leanmoe.") for point in points):
        raise LeanMoeError(
            f"leanmoe's plugin is not among SGLang's ({PLUGINS}): SGLang would run the full model "
            "and call it the plan; install leanmoe into SGLang's environment"
        )
    return version
