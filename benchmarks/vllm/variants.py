"""What a benchmark of vLLM compares: plans, and the kernels that compute under them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.vllm.layout import SINGLE, Layout
from leanmoe.core.schema import to_json
from leanmoe.models.shape import MoEShape
from leanmoe.plan import Plan, Rule
from leanmoe.serve.plugin_options import is_plain
from leanmoe.serve.vllm.small_steps import Skipped, Skipping, is_small

STOCK = "stock"
EMPTY = "empty plan"
REPEAT, SKIP, GROUP, DROP, AUTO = "repeat", "skip", "group", "drop", "auto"
"""What small steps do: a skipped slot is the token's best expert again, or is passed over, or slots
are grouped by expert where tokens share experts and else passed over; or a skipped slot has no row
in steps of any size; or the last of these that the engine can, as the plugin has it."""
OF_ALL = "batch_scope=all"
"""Word of a plan's description: its batch scope is all data-parallel ranks."""
VLLM, LEANMOE = "vllm", "leanmoe"
"""Whose kernels compute the experts."""


@dataclass(frozen=True)
class Variant:
    """A plan and what runs it."""

    name: str
    plan: Plan | None = None
    """None for vLLM's own routing."""
    small_steps: str = GROUP
    experts: str = VLLM
    cross_rank: bool = False
    """Whether the batch scope of batch-aware rules is all data-parallel ranks."""
    is_second: bool = False
    """Whether it differs from another variant in small steps alone."""

    def is_worth(self, load: int) -> bool:
        """Whether a step of so many requests is another than in some other variant."""
        if not self.is_second or self.plan is None:
            return True
        return any(is_small(load, slots, self.plan.model.experts) for slots in self.slots)

    @property
    def slots(self) -> set[int]:
        """Those that a token has, in any band."""
        if self.plan is None:
            return set()
        asked = {band.rules[0].top_k for band in self.plan.bands}
        return {self.plan.model.top_k if top_k is None else top_k for top_k in asked}

    @property
    def is_plain(self) -> bool:
        """Whether vLLM's own routing does all of it, so that no slot is skipped."""
        return self.plan is None or all(
            is_plain(rule) for band in self.plan.bands for rule in band.rules
        )

    @property
    def skipping(self) -> Skipping:
        """How its skipped slots are written."""
        if self.experts == LEANMOE:
            return Skipping(Skipped.BEYOND, Skipped.BEYOND)
        if self.small_steps == REPEAT:
            return Skipping()
        if self.small_steps == DROP:
            return Skipping.at_all_sizes(Skipped.MINUS_ONE, groups=True)
        return Skipping(small=Skipped.MINUS_ONE, groups=self.small_steps == GROUP)

    def to_json(self) -> dict[str, Any]:
        """Its settings; its plan's bands with the rule that is the same in all layers once."""
        found: dict[str, Any] = {"experts": self.experts}
        if not self.is_plain and self.experts == VLLM:
            found["small_steps"] = self.small_steps
        if self.cross_rank:
            found["batch_scope"] = "all"
        if self.plan is not None:
            bands = to_json(self.plan.bands)
            for band in bands:
                band["rules"] = band["rules"][:1]
            found["bands"] = bands
        return found


def variants_of(
    shape: MoEShape,
    plans: str,
    small_steps: Sequence[str],
    experts: Sequence[str],
    layout: Layout = SINGLE,
) -> list[Variant]:
    """Stock, the empty plan, and each plan in all variants that are asked for.

    `plans` is "name: field=value field=value; ...". The first of `small_steps` and of `experts`
    has the plan's plain name. A plan that is the same as another in this layout is left out: a
    budget a rank where experts are on one, the batch scope of all where there is one rank.
    """
    _check("--small-steps", small_steps, (REPEAT, SKIP, GROUP, DROP, AUTO))
    _check("--experts", experts, (VLLM, LEANMOE))
    model = shape.fingerprint()
    found = [Variant(STOCK), Variant(EMPTY, Plan.uniform(model, Rule()))]
    if LEANMOE in experts:
        found.append(Variant(f"{STOCK}, {LEANMOE}", experts=LEANMOE))
    for part in plans.split(";"):
        name, _, fields = part.partition(":")
        if not name.strip():
            continue
        cross_rank = OF_ALL in fields.split()
        rule = rule_of(fields.replace(OF_ALL, ""), shape.experts)
        is_on_one = rule.budget_per_rank is not None and layout.expert_ranks == 1
        if is_on_one or (cross_rank and layout.data == 1):
            continue
        plan = Plan.uniform(model, rule)
        plan.check(model)
        found += of_plan(name.strip(), plan, small_steps, experts, cross_rank)
    return found


def of_plan(
    name: str,
    plan: Plan,
    small_steps: Sequence[str],
    experts: Sequence[str],
    cross_rank: bool = False,
) -> list[Variant]:
    """A plan in all variants that are asked for."""
    found = []
    if VLLM in experts:
        found.append(Variant(name, plan, small_steps[0], cross_rank=cross_rank))
        others = [] if found[0].is_plain else small_steps[1:]
        found += [
            replace(found[0], name=f"{name}, {how}", small_steps=how, is_second=True)
            for how in others
        ]
    if LEANMOE in experts:
        found.append(Variant(f"{name}, {LEANMOE}", plan, experts=LEANMOE, cross_rank=cross_rank))
    return found


def rule_of(text: str, experts: int) -> Rule:
    """A rule from `field=value` words; a fraction is a share of the experts."""
    fields: dict[str, Any] = {}
    for word in text.split():
        name, _, value = word.partition("=")
        if "/" in value:
            above, below = value.split("/")
            fields[name] = experts * int(above) // int(below)
        else:
            fields[name] = json.loads(value or "true")
    return Rule.from_json(fields)


def _check(option: str, found: Sequence[str], known: tuple[str, ...]) -> None:
    if not found or not set(found) <= set(known):
        sys.exit(f"{option} is {','.join(found)}: it must be of {', '.join(known)}")
