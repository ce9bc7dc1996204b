"""The entry point that vLLM calls in each of its processes; without LEANMOE_PLAN it does nothing.

vLLM swallows what an import raises, not what the function does: so this file imports nothing.
"""

from __future__ import annotations

import os

PLAN = "LEANMOE_PLAN"
"""Path of the plan to run."""
DROP = "LEANMOE_DROP"
"""Parts of the plan to leave out, comma separated: see `plan_support.DROPPABLE`."""
STATISTICS = "LEANMOE_STATISTICS"
"""1 keeps each step's ids, so that `statistics` can say what ran."""
EXPERTS = "LEANMOE_EXPERTS"
"""Whose kernels compute the experts: vllm's (also where it is not set) or leanmoe's."""
OWN_EXPERTS = "leanmoe"


def activate() -> None:
    """Puts the plan of LEANMOE_PLAN to work in this process; raises LeanMoeError if it cannot."""
    path = os.environ.get(PLAN)
    if not path:
        return
    from leanmoe.serve import plan_support
    from leanmoe.serve.vllm.patch import install

    scope = os.environ.get(plan_support.BATCH_SCOPE, plan_support.RANK)
    plan_support.check_batch_scope(scope, "vLLM")
    drop = [part.strip() for part in os.environ.get(DROP, "").split(",") if part.strip()]
    install(
        path,
        drop,
        collect_stats=os.environ.get(STATISTICS) == "1",
        cross_rank=scope == plan_support.ALL,
        leanmoe_kernels=leanmoe_kernels(os.environ.get(EXPERTS, "")),
    )


def leanmoe_kernels(value: str) -> bool:
    """Whether LEANMOE_EXPERTS asks for leanmoe's kernels; raises LeanMoeError for other words."""
    if value not in ("", "vllm", OWN_EXPERTS):
        from leanmoe.core.errors import LeanMoeError

        raise LeanMoeError(f"{EXPERTS} is {value!r}: it must be vllm or {OWN_EXPERTS}")
    return value == OWN_EXPERTS
