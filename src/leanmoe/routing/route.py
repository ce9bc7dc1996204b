"""Router logits and a rule to expert ids and weights: the order in which a rule's fields apply."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
from leanmoe.routing.scores import (
    NEVER,
    NOT_USABLE,
    Scores,
    is_usable,
    order_keys,
    put_first,
    score,
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
    slots = top_k if rule.top_k is None else rule.top_k
    if slots == 0:
        return _nothing(logits_BTE)
    scores = score(logits_BTE, router, bias_E, rule.experts)
    whole = whole_top_k(scores, top_k, router, rule.renormalise)
    kept: Tensor | None
    over_budget = None
    if rule.is_batch_aware:
        has_bias = bias_E is not None
        ids, kept, over_budget = _shared(scores, slots, rule, router, has_bias, padding_BT, scope)
        weights = weigh(scores.gates_BTE.gather(-1, ids), router, kept, whole)
    elif rule.threshold is None and rule.top_p is None:
        ids, weights, kept = _best(scores, slots, rule, router, padding_BT, whole)
    else:
        ranked, ids = scores.ranking_BTE.topk(slots, dim=-1)
        kept = _without_padding(ranked > NEVER, padding_BT)
        kept = _wanted(scores, ids, kept, rule, router)
        if bias_E is not None:
            ids, kept = _kept_first(ids, kept)
        weights = weigh(scores.gates_BTE.gather(-1, ids), router, kept, whole)
    if kept is not None:
        ids = ids.masked_fill(~kept, logits_BTE.shape[-1])
    return Routing(ids, weights, over_budget)


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


def _best(
    scores: Scores,
    slots: int,
    rule: Rule,
    router: Router,
    padding_BT: Tensor | None,
    whole: WholeTopK | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids and weights of `top_k` alone, by the family's own calls, and what is kept of them."""
    all_usable = _all_usable(slots, scores.ranking_BTE.shape[-1], rule, router)
    in_order = router.sorted_top_k or not all_usable
    ranked, ids = scores.ranking_BTE.topk(slots, dim=-1, sorted=in_order)
    plain = scores.ranking_BTE is scores.gates_BTE
    gates = ranked if plain else scores.gates_BTE.gather(-1, ids)
    if all_usable:
        weights = weigh(gates, router, None, whole)
        if padding_BT is None:
            return ids, weights, None
        padding_BT1 = padding_BT.unsqueeze(-1)
        return ids, weights.masked_fill(padding_BT1, 0.0), (~padding_BT1).expand_as(ids)
    kept = _without_padding(ranked > NEVER, padding_BT)
    return ids, weigh(gates, router, kept, whole), kept


def _all_usable(slots: int, experts: int, rule: Rule, router: Router) -> bool:
    """Whether every token is sure to find `slots` experts that it may use."""
    if router.limits_groups:
        return rule.experts is None and slots <= experts // router.groups * router.groups_used
    return slots <= (experts if rule.experts is None else len(rule.experts))


def _shared(
    scores: Scores,
    slots: int,
    rule: Rule,
    router: Router,
    has_bias: bool,
    padding_BT: Tensor | None,
    scope: BatchScope,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids of the slots a token fills from the active experts of its step, and which of them."""
    experts = scores.ranking_BTE.shape[-1]
    keys_BTE = order_keys(scores.ranking_BTE)
    first_BTK, ids_BTK = keys_BTE.topk(slots, dim=-1)
    kept_BTK = None  # every slot
    if padding_BT is not None or not _all_usable(slots, experts, rule, router):
        kept_BTK = _without_padding(is_usable(first_BTK, experts), padding_BT)
    if rule.threshold is not None or rule.top_p is not None:
        kept_BTK = _wanted(scores, ids_BTK, kept_BTK, rule, router)
        if has_bias:
            keys_BTE = put_first(keys_BTE, ids_BTK, kept_BTK)
            ids_BTK, kept_BTK = _kept_first(ids_BTK, kept_BTK)

    votes_BTK = None
    if rule.has_budget:
        votes_BTK = votes(scores.gates_BTE.gather(-1, ids_BTK), router, kept_BTK)
    demand_B3E = count_demand(ids_BTK, kept_BTK, experts, rule.guaranteed, votes_BTK)
    if scope.exchange is not None:
        demand_B3E = scope.exchange(demand_B3E)
    active_BE, over_budget = select_active_experts(
        demand_B3E, rule, scope.placement, router.zero_experts
    )
    usable_BTE = keys_BTE.masked_fill(~active_BE.unsqueeze(-2), NOT_USABLE)
    filled_keys_BTK, filled_ids_BTK = usable_BTE.topk(slots, dim=-1)
    filled_BTK = is_usable(filled_keys_BTK, experts)
    if kept_BTK is not None:
        place_K = torch.arange(slots, device=ids_BTK.device)
        filled_BTK = filled_BTK & (place_K < kept_BTK.sum(dim=-1, keepdim=True))
    return filled_ids_BTK, filled_BTK, over_budget


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
