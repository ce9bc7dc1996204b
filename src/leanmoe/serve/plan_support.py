"""Which parts of a plan an engine can honour; needs no torch.

A part that an engine cannot honour is refused, unless the user drops it by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Plan

PROMPT = "prompt"
DROPPABLE = (PROMPT,)
"""Parts that a user can consent to run without."""
PROMPT_REASON = (
    "rules for prompt tokens cannot be honoured: a captured step does not know which of its "
    "tokens are a prompt's"
)

BATCH_SCOPE = "LEANMOE_BATCH_SCOPE"
"""Variable: whose tokens a rule that shares experts sees under data parallelism."""
RANK, ALL = "rank", "all"
KNOW_RANKS = ("vLLM",)
"""Engines whose adapter knows on which rank each expert is, and how to ask the other ranks."""


def without(plan: Plan, parts: Sequence[str]) -> Plan:
    """The plan less the parts named; raises LeanMoeError for a name that is none of `DROPPABLE`."""
    for part in parts:
        if part not in DROPPABLE:
            raise LeanMoeError(f"cannot drop {part!r}: it must be {' or '.join(DROPPABLE)}")
    return replace(plan, prompt=()) if PROMPT in parts else plan


def check_parts(plan: Plan, engine: str, consent: str) -> None:
    """Raises LeanMoeError if `engine`, vLLM or SGLang, would leave out a part of the plan.

    `consent` is what the user can write to run without it.
    """
    if any(not rule.is_empty for rule in plan.prompt):
        raise LeanMoeError(f"{engine}: {PROMPT_REASON}; {consent} runs the bands without them")
    if engine not in KNOW_RANKS:
        check_placed(plan, engine)


def check_placed(plan: Plan, engine: str) -> None:
    """Raises LeanMoeError if a rule needs to know on which GPU each expert is."""
    if plan.has_budget_per_rank:
        raise LeanMoeError(
            f"{engine}: budget_per_rank cannot be honoured: the adapter does not know on which GPU "
            "an expert is; on one GPU, budget is the same"
        )


def check_batch_scope(value: str, engine: str) -> None:
    """Raises LeanMoeError unless `value`, of LEANMOE_BATCH_SCOPE, is what `engine` can do."""
    if value not in (RANK, ALL):
        raise LeanMoeError(f"{BATCH_SCOPE} is {value!r}: it must be {RANK} or {ALL}")
    if value == ALL and engine not in KNOW_RANKS:
        raise LeanMoeError(
            f"{BATCH_SCOPE} is {ALL!r}: {engine} cannot share experts among data-parallel ranks "
            f"under leanmoe; unset it, or set {RANK}"
        )


def notes(plan: Plan, engine: str) -> tuple[str, ...]:
    """What an engine makes of the plan that its user should know, one sentence each."""
    rules = [rule for band in plan.bands for rule in band.rules]
    skips = any(
        rule.threshold or rule.top_p or rule.is_batch_aware or rule.experts for rule in rules
    )
    found = []
    if skips:
        found.append(
            f"{engine}'s kernels compute a skipped slot as a row of the token's best expert with "
            "weight 0: no further weights are read, but the row's products are not saved"
        )
    ends = [band.up_to for band in plan.bands if band.up_to is not None]
    if ends:
        found.append(
            f"a band is picked by the rows that a step computes, padding of captured graphs "
            f"included: make {', '.join(map(str, ends))} capture sizes"
        )
    if plan.bands and plan.bands[-1].up_to is not None:
        found.append(f"steps of more than {plan.bands[-1].up_to} rows run the full model")
    if any(rule.is_batch_aware for rule in rules):
        more = f"; {BATCH_SCOPE}={ALL} makes it all ranks'" if engine in KNOW_RANKS else ""
        found.append(f"a token's company is that of its own data-parallel rank{more}")
    return tuple(found)
