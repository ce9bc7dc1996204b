"""The entry point that SGLang calls in each of its processes; without LEANMOE_PLAN it does nothing.

SGLang swallows what a plugin raises and would serve the full model: so a plan that cannot run ends
the process, with one line that says why.
"""

from __future__ import annotations

import os

PLAN = "LEANMOE_PLAN"
DROP = "LEANMOE_DROP"


def activate() -> None:
    """Puts the plan of LEANMOE_PLAN to work in this process, or ends it."""
    path = os.environ.get(PLAN)
    if not path:
        return
    try:
        from leanmoe.serve import plan_support
        from leanmoe.serve.sglang.patch import install

        scope = os.environ.get(plan_support.BATCH_SCOPE, plan_support.RANK)
        plan_support.check_batch_scope(scope, "SGLang")
        drop = [part.strip() for part in os.environ.get(DROP, "").split(",") if part.strip()]
        install(path, drop)
    except Exception as error:
        raise SystemExit(f"leanmoe: {error}") from error
