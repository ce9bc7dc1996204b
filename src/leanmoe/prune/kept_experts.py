"""Which experts remain: the best by a criterion, as many in each layer, and in each group.

Letters: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import MoEShape
from leanmoe.plan import Band, Plan, Rule

Kept = tuple[tuple[int, ...], ...]
"""For each MoE layer the experts that remain, ascending."""


def kept_count(text: str, shape: MoEShape) -> int:
    """How many experts of a layer remain: "75%" of them, or a number; down to whole groups.

    Raises LeanMoeError for what is no such number, and where the model could not run with it.
    """
    try:
        wanted = float(text[:-1]) / 100 * shape.experts if text.endswith("%") else int(text)
    except ValueError as error:
        raise LeanMoeError(
            f"keep is {text!r}: it must be a share like 75% or a number of experts"
        ) from error
    groups = groups_of(shape)
    is_possible = 0 < wanted <= shape.experts
    kept = int(wanted / groups + 1e-9) * groups if is_possible else 0
    if not kept:
        raise LeanMoeError(f"keep is {text!r}: it must leave 1 to {shape.experts} experts a layer")
    check_count(kept, shape)
    return kept


def check_count(kept: int, shape: MoEShape) -> None:
    """Raises LeanMoeError unless stock engines can run the model with so many experts a layer."""
    groups, used = groups_of(shape), shape.router.groups_used
    if kept % groups:
        raise LeanMoeError(f"{kept} experts do not divide into the router's {groups} groups")
    usable = kept if groups == 1 else kept // groups * used
    if usable < shape.top_k:
        where = "" if groups == 1 else f" in the {used} groups a token may use"
        raise LeanMoeError(
            f"keeping {kept} of {shape.experts} experts leaves {usable}{where}: "
            f"a token needs {shape.top_k}"
        )
    if groups > 1 and shape.router.group_score == "top2_sum" and kept // groups < 2:
        raise LeanMoeError(
            f"keeping {kept} of {shape.experts} experts leaves 1 in each of {groups} groups: "
            "the router ranks a group by its best 2"
        )


def best_experts(
    scores_LE: NDArray[np.float64],
    kept: int | Sequence[int],
    shape: MoEShape,
    protected: Sequence[tuple[int, int]] = (),
) -> Kept:
    """The experts of highest score, `kept` in each layer and equally many in each group.

    `kept` is a number for every layer, or one for each: engines need equal ones, a plan does not.
    `protected` are pairs of layer and expert that stay whatever their score. Equal scores: the
    lower id. Raises LeanMoeError where more are protected than may remain.
    """
    groups = groups_of(shape)
    size = shape.experts // groups
    counts = [kept] * len(scores_LE) if isinstance(kept, int) else list(kept)
    scores_LE = scores_LE.astype(np.float64, copy=True)
    for layer, expert in protected:
        scores_LE[layer, expert] = np.inf
    found = []
    for layer, (scores_E, count) in enumerate(zip(scores_LE, counts, strict=True)):
        each = count // groups
        chosen: list[int] = []
        for first in range(0, shape.experts, size):
            group_E = scores_E[first : first + size]
            if int(np.isposinf(group_E).sum()) > each:
                raise LeanMoeError(
                    f"MoE layer {layer} has {int(np.isposinf(group_E).sum())} protected experts "
                    f"where {each} may remain"
                )
            order = np.lexsort((np.arange(size), -group_E))
            chosen += [first + int(expert) for expert in order[:each]]
        found.append(tuple(sorted(chosen)))
    return tuple(found)


def as_plan(kept: Kept, shape: MoEShape, provenance: dict[str, object] | None = None) -> Plan:
    """A plan that uses these experts alone, at every load: no weights are touched."""
    rules = tuple(Rule(experts=experts) for experts in kept)
    plan = Plan.per_layer(shape.fingerprint(), rules)
    return Plan(plan.model, plan.bands, provenance=provenance or {})


def restricted(plan: Plan, kept: Kept) -> Plan:
    """The plan with these experts alone, at every load: steps beyond its last band too."""

    def rules(those: Sequence[Rule]) -> tuple[Rule, ...]:
        return tuple(_restricted(rule, ids) for rule, ids in zip(those, kept, strict=True))

    bands = [Band(band.up_to, rules(band.rules)) for band in plan.bands]
    if not bands or bands[-1].up_to is not None:
        bands.append(Band(None, rules([Rule()] * len(kept))))
    prompt = rules(plan.prompt) if plan.prompt else ()
    return Plan(plan.model, tuple(bands), prompt, plan.provenance)


def _restricted(rule: Rule, kept: tuple[int, ...]) -> Rule:
    def within(budget: int | None) -> int | None:
        return None if budget is None else min(budget, len(kept))

    return replace(
        rule,
        experts=kept,
        budget=within(rule.budget),
        budget_per_rank=within(rule.budget_per_rank),
    )


def groups_of(shape: MoEShape) -> int:
    """Groups that each keep as many experts; 1 where the router does not choose among groups."""
    return shape.router.groups if shape.router.limits_groups else 1
