"""Router logits and a rule to expert ids and weights: the order in which a rule's fields apply."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leanmoe.families import Router
from leanmoe.plan import Rule
from leanmoe.routing.company import budgeted_experts, guaranteed_experts
from leanmoe.routing.scores import NEVER, Scores, score
from leanmoe.routing.select import above_threshold, reaching_top_p


class Routing(NamedTuple):
    """The experts of each token; a skipped slot has id E and weight 0."""

    ids_STK: Tensor
    weights_STK: Tensor
    over_budget_S: Tensor | None
    """Where `budget` is set: True for steps whose tokens' best experts alone exceed it."""


def route(
    logits_STE: Tensor,
    router: Router,
    top_k: int,
    rule: Rule,
    bias_E: Tensor | None = None,
    padding_ST: Tensor | None = None,
) -> Routing:
    """Picks and weighs each token's experts under `rule`.

    Args:
        logits_STE: router logits; leading S are independent steps and may be absent.
        top_k: the model's own number of experts a token.
        bias_E: the ranking bias, for routers that have one.
        padding_ST: True for tokens that are padding: they use no expert and wake none.

    Fields apply in the plan's order: `experts`, the model's ranking, `top_k`, then `threshold`
    and `top_p` decide how many slots a token wants, then `guaranteed` and `budget` decide which
    experts are awake, and each token fills the slots it wants from those, in its own order. A
    rule that only sets `top_k` computes what the family computes with that k.
    """
    slots = top_k if rule.top_k is None else rule.top_k
    scores = score(logits_STE, router, bias_E, rule.experts)
    if slots == 0:
        return _nothing(logits_STE)
    only_top_k = not _selects(rule) and rule.experts is None and padding_ST is None
    ranked_STK, ids_STK = scores.ranking_STE.topk(
        slots, dim=-1, sorted=router.sorted_top_k or not only_top_k
    )
    if only_top_k:
        return Routing(ids_STK, _weigh(scores, ids_STK, router, logits_STE, None), None)

    kept_STK = ranked_STK > NEVER
    if padding_ST is not None:
        kept_STK = kept_STK & ~padding_ST.unsqueeze(-1)
    if rule.threshold is not None or rule.top_p is not None:
        kept_STK = kept_STK & _wanted(_gates(scores, ids_STK, router), rule)
    over_budget = None
    if rule.depends_on_company:
        ids_STK, kept_STK, over_budget = _shared(scores, ids_STK, kept_STK, rule, router)
    weights_STK = _weigh(scores, ids_STK, router, logits_STE, kept_STK)
    return Routing(ids_STK.masked_fill(~kept_STK, logits_STE.shape[-1]), weights_STK, over_budget)


def _selects(rule: Rule) -> bool:
    return rule.threshold is not None or rule.top_p is not None or rule.depends_on_company


def _gates(scores: Scores, ids_STK: Tensor, router: Router) -> Tensor:
    """Gates of the picked slots on a scale where they can be compared and added."""
    gates_STK = scores.gates_STE.gather(-1, ids_STK)
    if router.scoring == "softmax_after_top_k":
        return torch.softmax(gates_STK.float(), dim=-1)
    return gates_STK


def _wanted(gates_STK: Tensor, rule: Rule) -> Tensor:
    wanted = torch.ones_like(gates_STK, dtype=torch.bool)
    if rule.threshold is not None:
        wanted &= above_threshold(gates_STK, rule.threshold)
    if rule.top_p is not None:
        wanted &= reaching_top_p(gates_STK, rule.top_p)
    return wanted


def _shared(
    scores: Scores, ids_STK: Tensor, kept_STK: Tensor, rule: Rule, router: Router
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Each token's wanted number of slots, refilled in its order from the experts awake."""
    experts, slots = scores.ranking_STE.shape[-1], ids_STK.shape[-1]
    # Kept slots first: threshold may drop one in the middle, since the bias ranks, not the gate.
    kept_STK, order_STK = kept_STK.sort(dim=-1, descending=True, stable=True)
    ids_STK = ids_STK.gather(-1, order_STK)
    awake_SE, over_budget = None, None
    if rule.guaranteed is not None:
        awake_SE = guaranteed_experts(ids_STK, kept_STK, rule.guaranteed, experts)
    if rule.budget is not None:
        gates_STK = _gates(scores, ids_STK, router)
        voters_STK = kept_STK
        if awake_SE is not None:
            voters_STK = kept_STK & awake_SE.unsqueeze(-2).expand_as(scores.gates_STE).gather(
                -1, ids_STK
            )
        awake_SE, over_budget = budgeted_experts(
            ids_STK, gates_STK, voters_STK, rule.budget, experts
        )
    assert awake_SE is not None
    usable_STE = scores.ranking_STE.masked_fill(~awake_SE.unsqueeze(-2), NEVER)
    ranked_STK, ids_STK = usable_STE.topk(slots, dim=-1)
    wanted_ST1 = kept_STK.sum(dim=-1, keepdim=True)
    place_K = torch.arange(slots, device=ids_STK.device)
    return ids_STK, (ranked_STK > NEVER) & (place_K < wanted_ST1), over_budget


def _weigh(
    scores: Scores,
    ids_STK: Tensor,
    router: Router,
    logits_STE: Tensor,
    kept_STK: Tensor | None,
) -> Tensor:
    """Gate weights of the kept slots, normalised and scaled as the family does it."""
    gates_STK = scores.gates_STE.gather(-1, ids_STK)
    if router.scoring == "softmax_after_top_k":
        if kept_STK is None:
            return torch.softmax(gates_STK, dim=-1, dtype=logits_STE.dtype)
        masked_STK = gates_STK.masked_fill(~kept_STK, NEVER)
        weights_STK = torch.softmax(masked_STK, dim=-1, dtype=logits_STE.dtype)
        return weights_STK.masked_fill(~kept_STK, 0.0)  # no slot kept: softmax gave NaN
    if kept_STK is not None:
        gates_STK = gates_STK.masked_fill(~kept_STK, 0.0)
    if router.normalise:
        total_ST1 = gates_STK.sum(dim=-1, keepdim=True)
        if router.normalise_epsilon:
            total_ST1 = total_ST1 + router.normalise_epsilon
        elif kept_STK is not None:
            total_ST1 = total_ST1.masked_fill(total_ST1 == 0, 1.0)
        gates_STK = gates_STK / total_ST1
    return gates_STK if router.scaling == 1.0 else gates_STK * router.scaling


def _nothing(logits_STE: Tensor) -> Routing:
    """`top_k` 0: one slot a token, skipped, since an experts module wants at least one."""
    shape = (*logits_STE.shape[:-1], 1)
    ids_STK = torch.full(shape, logits_STE.shape[-1], dtype=torch.int64, device=logits_STE.device)
    return Routing(ids_STK, torch.zeros(shape, device=logits_STE.device), None)
