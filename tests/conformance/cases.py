"""Hypothesis strategies: routers, rules, logits and padding, hostile ones included."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from leanmoe.models.families import Router
from leanmoe.plan import Fingerprint, Rule
from leanmoe.plan.placement import Placement
from leanmoe.routing import RuleTable

ROUTERS = {
    "softmax": Router(),
    "softmax, normalised": Router(normalise=True),
    "softmax after top-k": Router("softmax_after_top_k", score_dtype="logits"),
    "sigmoid with a bias": Router("sigmoid", "bias", True, 1e-20, scaling=2.5, sorted_top_k=False),
    "square root of softplus": Router("sqrtsoftplus", "bias", True, 1e-20, 1.5, sorted_top_k=False),
    "identities": Router(ranking_bias="bias", scaling=6.0, sorted_top_k=False, zero_experts=8),
    "V3 groups": Router("sigmoid", "bias", True, 1e-20, 2.5, 4, 2, "top2_sum", False),
    "V2 groups": Router(scaling=1.5, groups=4, groups_used=2, group_score="max"),
}


SHARES = (0.047, 0.317, 0.613, 0.891)
"""No share of a few equal gates: there float32 and the loops' float64 may differ by a slot."""


@dataclass(frozen=True)
class Case:
    """One call of `route`; E is a multiple of 4 for the groups' sake."""

    name: str
    logits_BTE: Tensor
    bias_E: Tensor | None
    padding_BT: Tensor | None
    top_k: int
    rule: Rule
    placement: Placement | None = None

    @property
    def router(self) -> Router:
        return ROUTERS[self.name]

    @property
    def experts(self) -> int:
        return self.logits_BTE.shape[-1]

    @property
    def slots(self) -> int:
        return self.top_k if self.rule.top_k is None else self.rule.top_k


@dataclass(frozen=True)
class TableCase:
    """One call of `route_rows`; the rule of `case` has no part in it."""

    case: Case
    table: RuleTable
    rule_rows_BT: Tensor


@st.composite
def cases(
    draw: st.DrawFn, scope: bool | None = None, hostile: bool = True, placed: bool = False
) -> Case:
    """`scope`: whether tokens share experts, None for either; `hostile`: ties and saturation;
    `placed`: experts are on several ranks, each with a budget."""
    name = draw(st.sampled_from(sorted(ROUTERS)))
    experts = draw(st.sampled_from((32, 64)))  # whole vectors: sigmoid rounds a rest differently
    shape = (draw(st.integers(1, 3)), draw(st.integers(0, 9)), experts)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from((0.01, 1.0, 30.0))) if hostile else 1.0
    logits = torch.randn(shape, generator=generator) * scale
    bias = torch.randn(experts, generator=generator) * draw(st.sampled_from((0.0, 0.1, 3.0)))
    if hostile and draw(st.booleans()):
        logits, bias = logits.mul(0.5).round(), bias.round()
    padding = None
    if draw(st.booleans()):
        padding = torch.rand(shape[:2], generator=generator) < draw(st.sampled_from((0.3, 1.0)))
        logits = logits.masked_fill(padding.unsqueeze(-1), float("nan"))
    top_k = draw(st.integers(1, 6))
    rule = draw(rules(experts, top_k, scope))
    placement = None
    if placed:
        rule = replace(rule, budget_per_rank=draw(st.integers(1, 8)))
        placement = draw(placements(experts))
    has_bias = ROUTERS[name].ranking_bias is not None
    return Case(name, logits, bias if has_bias else None, padding, top_k, rule, placement)


@st.composite
def placements(draw: st.DrawFn, experts: int) -> Placement:
    """Even and uneven ones, one by one in any order, and with ranks that have none."""
    ranks = draw(st.integers(1, 5))
    made = draw(st.sampled_from((Placement.linear, Placement.round_robin, None)))
    if made is not None:
        return made(experts, ranks)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    drawn = torch.randint(ranks, (experts,), generator=generator)
    return Placement(tuple(drawn.tolist()), ranks)


@st.composite
def rules(draw: st.DrawFn, experts: int, top_k: int, scope: bool | None) -> Rule:
    """Rules that `Rule.check` accepts, each field absent as often as not."""

    def maybe(strategy: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | strategy)

    remain = maybe(st.sets(st.integers(0, experts - 1), min_size=1).map(lambda s: tuple(sorted(s))))
    most = min(top_k, experts if remain is None else len(remain))
    fewer = maybe(st.integers(1, most))
    slots = most if fewer is None else fewer
    share = st.sampled_from(SHARES)
    guaranteed = None if scope is False else maybe(st.integers(1, slots))
    kept = experts if remain is None else len(remain)
    budget = None if scope is False else maybe(st.integers(1, kept))
    if scope and guaranteed is None and budget is None:
        guaranteed = draw(st.integers(1, slots))
    renormalise = draw(st.sampled_from((1.0, 0.0, 0.25, 0.5)))
    rule = Rule(fewer, maybe(share), maybe(share), guaranteed, budget, remain, renormalise)
    rule.check(Fingerprint("Model", 1, 1, experts, top_k))
    return rule


@st.composite
def table_cases(draw: st.DrawFn, scope: bool | None = None, hostile: bool = True) -> TableCase:
    """A table of one or two levels and a step whose tokens are of any rows, or all of one."""
    case = draw(cases(scope=False, hostile=hostile))
    levels = []
    for _ in range(draw(st.integers(1, 2))):
        reply = draw(rules(case.experts, case.top_k, scope))
        prompt = draw(st.none() | rules(case.experts, case.top_k, False))
        if prompt is not None and draw(st.booleans()):
            prompt = replace(prompt, top_k=0)
        levels.append((reply, prompt))
    table = RuleTable.of(case.top_k, levels)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = case.logits_BTE.shape[:2]
    rule_rows_BT = torch.randint(len(table.rows), shape, generator=generator)
    return TableCase(case, table, rule_rows_BT)
