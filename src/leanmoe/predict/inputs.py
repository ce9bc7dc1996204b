"""`leanmoe predict`: from what a user names to what `cost` computes with. Needs no torch, unless a
profile's traces have to be replayed under a plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import MoEShape
from leanmoe.plan import Plan, Rule

if TYPE_CHECKING:
    pass


def find_plan(
    model: MoEShape, path: Path | None, top_k: int | None, guaranteed: int | None
) -> Plan | None:
    """A saved plan, or a uniform one; raises LeanMoeError where both are asked for or none fits."""
    if path is not None and (top_k is not None or guaranteed is not None):
        raise LeanMoeError("give --plan, or --top-k and --guaranteed, not both")
    fingerprint = model.fingerprint()
    if path is not None:
        plan = Plan.load(path)
        plan.check(fingerprint, more_experts=True)
        return plan
    if top_k is None and guaranteed is None:
        return None
    plan = Plan.uniform(fingerprint, Rule(top_k=top_k, guaranteed=guaranteed))
    plan.check(fingerprint)
    return plan
