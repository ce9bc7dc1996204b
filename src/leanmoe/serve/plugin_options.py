"""What the plugins of vLLM and SGLang are asked to do, read from the environment and checked once.

An engine starts its worker processes itself, so its user can reach them by variables alone. Their
names, values and meanings are in `core.environment.VARIABLES`. Needs no torch and no engine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from leanmoe.core.environment import (
    BATCH_SCOPE,
    DROP,
    EXPERTS,
    PLAN,
    STATISTICS,
    VARIABLES,
    Variable,
)
from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Plan
from leanmoe.serve.plan_support import ALL, PROMPT, RANK, check_batch_scope, check_parts, without

__all__ = ["VARIABLES", "PluginOptions", "Variable"]

VLLM, LEANMOE = "vllm", "leanmoe"
"""Whose kernels compute the experts."""


@dataclass(frozen=True)
class PluginOptions:
    """What one process of an engine does with a plan."""

    path: str = ""
    """The plan's file, for the log and the metrics."""
    drop: tuple[str, ...] = ()
    """Parts of the plan that may be left out: `plan_support.DROPPABLE`."""
    collect_stats: bool = False
    """Keeps each step's expert ids, so that one can ask what ran."""
    cross_rank: bool = False
    """A batch-aware rule sees the tokens of all data-parallel ranks, not its own rank's alone."""
    experts: str | None = None
    """Whose kernels compute the experts, VLLM or LEANMOE; None: leanmoe's in layers that skip slots
    and whose own kernels cannot, where leanmoe's can compute them."""

    @classmethod
    def from_environ(
        cls, engine: str, environ: Mapping[str, str] = os.environ
    ) -> PluginOptions | None:
        """What `engine`, vLLM or SGLang, is asked to do; None where it is given no plan.

        Raises LeanMoeError for a value that is not allowed, or that this engine cannot do.
        """
        path = environ.get(PLAN)
        if not path:
            return None
        scope = environ.get(BATCH_SCOPE) or RANK
        check_batch_scope(scope, engine)
        experts = _one_of(environ, EXPERTS, (VLLM, LEANMOE)) if environ.get(EXPERTS) else None
        if experts == LEANMOE and engine != "vLLM":
            raise LeanMoeError(
                f"{EXPERTS} is {experts!r}: leanmoe's kernels cannot run in {engine}; unset it"
            )
        return cls(
            path,
            tuple(part.strip() for part in environ.get(DROP, "").split(",") if part.strip()),
            collect_stats=_one_of(environ, STATISTICS, ("0", "1")) == "1",
            cross_rank=scope == ALL,
            experts=experts,
        )

    def load_plan(self, engine: str) -> Plan:
        """The plan less what may be left out; raises LeanMoeError if `engine` cannot run it."""
        plan = without(Plan.load(Path(self.path)), self.drop)
        check_parts(plan, engine, f"{DROP}={PROMPT}")
        return plan


def _one_of(environ: Mapping[str, str], name: str, allowed: tuple[str, str]) -> str:
    value = environ.get(name) or allowed[0]
    if value not in allowed:
        raise LeanMoeError(f"{name} is {value!r}: it must be {' or '.join(allowed)}")
    return value
