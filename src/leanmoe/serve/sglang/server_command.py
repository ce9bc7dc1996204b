"""The command that serves a model with a plan in SGLang; needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from leanmoe.core.environment import DROP, LEVEL, PLAN
from leanmoe.models.reference import folder_of


def environment(plan: Path | None, drop: Sequence[str], level: str | None = None) -> dict[str, str]:
    """Variables that the server needs besides those it is given; without a plan it is stock."""
    variables = {} if plan is None else {PLAN: str(plan.resolve())}
    if level:
        variables[LEVEL] = level
    if drop:
        variables[DROP] = ",".join(drop)
    return variables


def command(model: str, host: str, port: int, more: Sequence[str]) -> list[str]:
    """The server's command line; what the user adds comes last and so prevails.

    SGLang has /metrics only where it is told to keep any.
    """
    words = [sys.executable, "-m", "sglang.launch_server", "--model-path", folder_of(model)]
    words += ["--served-model-name", model, "--host", host, "--port", str(port)]
    return [*words, "--enable-metrics", *more]
