"""Router logits and a rule to expert ids and weights: the order in which a rule's fields apply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.routing.batch_rules import (
    ALONE,
    BatchScope,
    by_rank,
    count_demand,
    select_active_experts,
)
from leanmoe.routing.gate_weights import WholeTopK, votes, weigh
from leanmoe.routing.rule_table import TRAINED, RowRule, RuleTable
from leanmoe.routing.scores import (
    NEVER,
    NOT_USABLE,
    Scores,
    is_usable,
    order_keys,
    put_first,
    score,
    score_dtype,
)
from leanmoe.routing.token_rules import wanted


class Routing(NamedTuple):
    """The experts of each token; a skipped slot has id E and weight 0."""

    ids_BTK: Tensor
    """int64; best ranked first, skipped slots last. With no field set but `top_k` and `experts`,
    in the order of the family's own top-k, which some leave unsorted."""
    weights_BTK: Tensor
    """In the router's score dtype: float32 but for families that compute in the logits' own."""
    over_budget_B: Tensor | None
    """Where a budget is set: True for steps whose tokens' best experts alone exceed it."""


def route(
    logits_BTE: Tensor,
    router: Router,
    top_k: int,
    rule: Rule,
    bias_E: Tensor | None = None,
    padding_BT: Tensor | None = None,
    scope: BatchScope = ALONE,
) -> Routing:
    """Picks and weighs each token's experts under `rule`.

    Args:
        logits_BTE: router logits; leading B are independent steps and may be absent. Not checked
            for NaN: see `check_logits`.
        top_k: the model's own number of experts a token.
        rule: one that `Rule.check` accepts for the model.
        bias_E: the ranking bias, for routers that have one.
        padding_BT: True for tokens that are padding: they use no expert and activate none.
        scope: which ranks the experts are on, for `budget_per_rank`, and how to learn of tokens
            on other ranks. A rule that is not batch-aware needs neither.

    The fields apply in the plan's order:

    1. `experts` and the router's own group limits leave the experts a token may use, ranked by
       the family's scores and bias.
    2. `top_k`: the token's best that many. An empty rule, or one with `top_k` alone, computes what
       the family computes with that k, in the same operations.
    3. `threshold` and `top_p` drop some of these; how many are left is what the token wants.
    4. `guaranteed`, `budget` and `budget_per_rank` decide which experts are active in the step. A
       token keeps those of its slots whose experts are active and fills the number it wants with
       the active experts that follow in its own ranking, however far down it (OEA's algorithm 1
       sets no lowest rank), so it may use experts beyond its own top-k; with too few active its
       last slots are skipped. With both, the candidates for the budget are the guaranteed ones,
       and the budget prevails over all of a token's guaranteed experts but its best. Equal
       rankings: lower id first.
    5. Weights of the slots that remain, normalised and scaled as the family does it; with
       `renormalise` below 1 by a sum that the token's own best `top_k` slots, all of the model's,
       have their part in, whichever run. A router that does not normalise knows no such sum.
    """
    row = RowRule.reply(rule, top_k)
    if row.slots == 0:
        return _nothing(logits_BTE)
    step = _Step(logits_BTE, router, top_k, bias_E, padding_BT, scope)
    [(ids_BTK, weights_BTK)], over_budget_B = _route(step, RuleTable((row,)), [None])
    return Routing(ids_BTK, weights_BTK, over_budget_B)


def route_rows(
    logits_BTE: Tensor, router: Router, top_k: int, table: RuleTable, rule_rows_BT: Tensor,
    bias_E: Tensor | None = None, padding_BT: Tensor | None = None, scope: BatchScope = ALONE,
) -> Routing:  # fmt: skip
    """As `route`, each token under the row of `table` that `rule_rows_BT` (integers) names.

    A number that is no row of the table means row 0. Every token has as many slots (K) as the
    widest row. The rule of a row applies as in `route`, but for step 4, which all tokens share:

    - A token's first `marks` slots are candidates; without a budget all candidates are active. A
      token with `marks` votes, with every slot it wants.
    - The budgets are those of `RuleTable.step_rule`. The experts of a token's first `must` slots
      are active whatever the budget, and count against it.
    - A token keeps its first `own` slots whatever is active. Under a batch-aware rule it fills the
      others with active experts; under any other rule it keeps its own.

    So a step of one row's tokens is what `route` makes of their rule, with the table's budgets,
    and a token under a rule of tokens alone gets what it would get alone.
    """
    step = _Step(logits_BTE, router, top_k, bias_E, padding_BT, scope)
    is_known_BT = (rule_rows_BT >= 0) & (rule_rows_BT < len(table.rows))
    rows_BT1 = rule_rows_BT.where(is_known_BT, TRAINED).unsqueeze(-1)
    is_row = [rows_BT1 == number for number in range(len(table.rows))]
    chosen, over_budget_B = _route(step, table, is_row)
    experts, slots = logits_BTE.shape[-1], max(table.slots, 1)
    shape = (*logits_BTE.shape[:-1], slots)
    ids_BTK = torch.full(shape, experts, dtype=torch.int64, device=logits_BTE.device)
    weights_BTK = torch.zeros(
        shape, device=logits_BTE.device, dtype=score_dtype(router, logits_BTE)
    )
    for is_row_BT1, (ids, weights) in zip(is_row, chosen, strict=True):
        more = (0, slots - ids.shape[-1])
        ids_BTK = torch.where(is_row_BT1, functional.pad(ids, more, value=experts), ids_BTK)
        weights_BTK = torch.where(is_row_BT1, functional.pad(weights, more), weights_BTK)
    return Routing(ids_BTK, weights_BTK, over_budget_B)


class _Step(NamedTuple):
    """What is routed."""

    logits_BTE: Tensor
    router: Router
    top_k: int
    bias_E: Tensor | None
    padding_BT: Tensor | None
    scope: BatchScope


class _Own(NamedTuple):
    """The slots of every token under one rule, before any other token is looked at."""

    ids_BTK: Tensor
    kept_BTK: Tensor | None
    """None for every slot."""
    keys_BTE: Tensor | None
    """The order in which it fills slots with active experts; None under a rule of tokens alone."""


def _route(
    step: _Step, table: RuleTable, is_row: Sequence[Tensor | None]
) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """Ids and weights as if all tokens were of each row in turn, and where a budget is exceeded.

    `is_row` (B,T,1) says which are: only these have a demand. None for all.
    """
    masks = {row.rule.experts for row in table.rows}
    scores = {
        experts: score(step.logits_BTE, step.router, step.bias_E, experts) for experts in masks
    }
    by_row = [scores[row.rule.experts] for row in table.rows]
    owns = [_own(step, scored, row) for scored, row in zip(by_row, table.rows, strict=True)]
    active_BE = over_budget_B = None
    if table.is_batch_aware:
        step_rule = table.step_rule
        demand_B3E = torch.stack(
            [
                _demand(step.router, scored, own, row, is_row_BT1, step_rule.has_budget)
                for scored, own, row, is_row_BT1 in zip(
                    by_row, owns, table.rows, is_row, strict=True
                )
            ]
        ).sum(dim=0)
        if step.scope.exchange is not None:
            demand_B3E = step.scope.exchange(demand_B3E)
        active_BE, over_budget_B = select_active_experts(
            demand_B3E, step_rule, step.scope.placement, step.router.zero_experts
        )
    chosen = []
    for scored, own, row in zip(by_row, owns, table.rows, strict=True):
        ids_BTK, kept_BTK = _filled(own, row, active_BE)
        whole = whole_top_k(scored, step.top_k, step.router, row.rule.renormalise)
        gates_BTK = scored.gates_BTE.gather(-1, ids_BTK)
        weights_BTK = weigh(gates_BTK, step.router, kept_BTK, whole)
        if kept_BTK is not None:
            ids_BTK = ids_BTK.masked_fill(~kept_BTK, step.logits_BTE.shape[-1])
        chosen.append((ids_BTK, weights_BTK))
    return chosen, over_budget_B


def whole_top_k(scores: Scores, top_k: int, router: Router, renormalise: float) -> WholeTopK | None:
    """The token's best `top_k` experts among those it may use, nothing for missing ones.

    None where the weights of the slots that run do not depend on them.
    """
    if renormalise == 1 or not router.normalises:
        return None
    slots = min(top_k, scores.ranking_BTE.shape[-1])
    ranked, ids = scores.ranking_BTE.topk(slots, dim=-1)
    nothing = NEVER if router.scoring == "softmax_after_top_k" else 0.0
    gates_BTK = scores.gates_BTE.gather(-1, ids).masked_fill(ranked == NEVER, nothing)
    return WholeTopK(gates_BTK, renormalise)


def _own(step: _Step, scores: Scores, row: RowRule) -> _Own:
    """Steps 1 to 3: by the family's own calls, or, where tokens share, in one definite order."""
    rule, padding_BT = row.rule, step.padding_BT
    experts = scores.ranking_BTE.shape[-1]
    drops = row.slots > 0 and (rule.threshold is not None or rule.top_p is not None)
    all_usable = _all_usable(row.slots, experts, rule, step.router)
    keys_BTE = kept_BTK = None
    if rule.is_batch_aware:
        keys_BTE = order_keys(scores.ranking_BTE)
        ranked_BTK, ids_BTK = keys_BTE.topk(row.slots, dim=-1)
        if padding_BT is not None or not all_usable:
            kept_BTK = _without_padding(is_usable(ranked_BTK, experts), padding_BT)
    else:
        in_order = step.router.sorted_top_k or drops or not all_usable
        ranked_BTK, ids_BTK = scores.ranking_BTE.topk(row.slots, dim=-1, sorted=in_order)
        if drops or not all_usable:
            kept_BTK = _without_padding(ranked_BTK > NEVER, padding_BT)
        elif padding_BT is not None:
            kept_BTK = (~padding_BT).unsqueeze(-1).expand_as(ids_BTK)
    if drops:
        kept_BTK = _wanted(scores, ids_BTK, kept_BTK, rule, step.router)
        if step.bias_E is not None:
            if keys_BTE is not None:
                keys_BTE = put_first(keys_BTE, ids_BTK, kept_BTK)
            ids_BTK, kept_BTK = _kept_first(ids_BTK, kept_BTK)
    return _Own(ids_BTK, kept_BTK, keys_BTE)


def _all_usable(slots: int, experts: int, rule: Rule, router: Router) -> bool:
    """Whether every token is sure to find `slots` experts that it may use."""
    if router.limits_groups:
        return rule.experts is None and slots <= experts // router.groups * router.groups_used
    return slots <= (experts if rule.experts is None else len(rule.experts))


def _demand(
    router: Router, scores: Scores, own: _Own, row: RowRule, is_row_BT1: Tensor | None,
    has_budget: bool,
) -> Tensor:  # fmt: skip
    """Step 4, first half: what a row's tokens ask for (B,3,E)."""
    kept_BTK, votes_BTK = own.kept_BTK, None
    if is_row_BT1 is not None:
        everything = torch.ones_like(own.ids_BTK, dtype=torch.bool)
        kept_BTK = (everything if kept_BTK is None else kept_BTK) & is_row_BT1
    if has_budget and row.marks > 0 and row.must < row.slots:  # else no vote decides anything
        votes_BTK = votes(scores.gates_BTE.gather(-1, own.ids_BTK), router, kept_BTK)
    experts = scores.ranking_BTE.shape[-1]
    return count_demand(own.ids_BTK, kept_BTK, experts, row.marks, votes_BTK, row.must)


def _filled(own: _Own, row: RowRule, active_BE: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Step 4, second half: the ids of a row's tokens, and which of them are kept."""
    ids_BTK, kept_BTK, keys_BTE = own
    if keys_BTE is None or active_BE is None:
        return ids_BTK, kept_BTK
    is_out_BTE = ~active_BE.unsqueeze(-2)
    if row.own > row.must:  # what it must have is active anyway
        everything_BTK = torch.ones_like(ids_BTK, dtype=torch.bool)
        own_BTK = (everything_BTK if kept_BTK is None else kept_BTK)[..., : row.own]
        nothing_BTE = torch.zeros_like(keys_BTE, dtype=torch.bool)
        is_out_BTE = is_out_BTE & ~nothing_BTE.scatter(-1, ids_BTK[..., : row.own], own_BTK)
    usable_BTE = keys_BTE.masked_fill(is_out_BTE, NOT_USABLE)
    filled_keys_BTK, filled_ids_BTK = usable_BTE.topk(row.slots, dim=-1)
    filled_BTK = is_usable(filled_keys_BTK, keys_BTE.shape[-1])
    if kept_BTK is not None:
        place_K = torch.arange(row.slots, device=ids_BTK.device)
        filled_BTK = filled_BTK & (place_K < kept_BTK.sum(dim=-1, keepdim=True))
    return filled_ids_BTK, filled_BTK


def _wanted(
    scores: Scores, ids_BTK: Tensor, kept_BTK: Tensor | None, rule: Rule, router: Router
) -> Tensor:
    """The usable slots that `threshold` and `top_p` keep; those of unusable experts weigh 0."""
    gates_BTK = scores.gates_BTE.gather(-1, ids_BTK)
    if kept_BTK is None:
        return wanted(gates_BTK, rule, router)
    unusable = NEVER if router.scoring == "softmax_after_top_k" else 0.0
    return kept_BTK & wanted(gates_BTK.masked_fill(~kept_BTK, unusable), rule, router)


def _kept_first(ids_BTK: Tensor, kept_BTK: Tensor) -> tuple[Tensor, Tensor]:
    """Slots that are kept before those that are not.

    A bias ranks but the gate is compared with the threshold: a slot in the middle may be dropped.
    """
    kept_BTK, order_BTK = kept_BTK.sort(dim=-1, descending=True, stable=True)
    return ids_BTK.gather(-1, order_BTK), kept_BTK


def _without_padding(kept_BTK: Tensor, padding_BT: Tensor | None) -> Tensor:
    return kept_BTK if padding_BT is None else kept_BTK & ~padding_BT.unsqueeze(-1)


def _nothing(logits_BTE: Tensor) -> Routing:
    """`top_k` 0: one slot a token, skipped, since an experts module wants at least one."""
    shape = (*logits_BTE.shape[:-1], 1)
    ids_BTK = torch.full(shape, logits_BTE.shape[-1], dtype=torch.int64, device=logits_BTE.device)
    return Routing(ids_BTK, torch.zeros(shape, device=logits_BTE.device), None)


def count_distinct(ids_BTK: Tensor, experts: int) -> Tensor:
    """Distinct experts [B] (int64) active in each step; skipped slots (id E) activate nothing."""
    return _active(ids_BTK, experts).sum(dim=-1)


def count_distinct_by_rank(ids_BTK: Tensor, placement: Placement) -> Tensor:
    """Distinct experts (B,R) (int64) active on each rank; the largest decides the step's time."""
    active_BE = _active(ids_BTK, placement.experts)
    return by_rank(active_BE, placement, fill=False).sum(dim=-1)


def count_slots(ids_BTK: Tensor, experts: int) -> Tensor:
    """Slots [B] (int64) that the tokens of each step use: rows the experts compute."""
    return (ids_BTK < experts).sum(dim=(-1, -2))


def _active(ids_BTK: Tensor, experts: int) -> Tensor:
    flat_BX = ids_BTK.flatten(-2)
    shape = (*flat_BX.shape[:-1], experts + 1)
    active_BE = torch.zeros(shape, dtype=torch.bool, device=ids_BTK.device)
    return active_BE.scatter_(-1, flat_BX, True)[..., :experts]
