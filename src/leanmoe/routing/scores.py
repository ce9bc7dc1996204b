"""Router logits to gates (what an expert weighs) and ranking (what decides who is picked)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leanmoe.families import Router

NEVER = float("-inf")


class Scores(NamedTuple):
    """One value per token and expert, both of the logits' shape."""

    gates_STE: Tensor
    """What a picked expert weighs, before normalising and scaling."""
    ranking_STE: Tensor
    """What ranks the experts: bias included; -inf where groups or `experts` exclude one."""


def score(
    logits_STE: Tensor,
    router: Router,
    bias_E: Tensor | None = None,
    experts: tuple[int, ...] | None = None,
) -> Scores:
    """Scores as the family computes them; `experts` are those that remain, None for all.

    The bias ranks and does not weigh (DeepSeek-V3 report, section 2.1.2). Group limits follow
    DeepSeek-V2 (a group is as good as its best expert) or V3 (as its best two together).
    """
    if router.scoring == "softmax_after_top_k":
        gates = ranking = logits_STE
    elif router.scoring == "sigmoid":
        gates = ranking = logits_STE.float().sigmoid()
    else:
        gates = ranking = torch.softmax(logits_STE, dim=-1, dtype=torch.float32)
    if bias_E is not None:
        ranking = ranking + bias_E
    if experts is not None:
        kept_E = torch.zeros(logits_STE.shape[-1], dtype=torch.bool, device=logits_STE.device)
        kept_E[list(experts)] = True
        ranking = ranking.masked_fill(~kept_E, NEVER)
    if router.groups > 1 and router.groups_used < router.groups:
        ranking = _limit_groups(ranking, router)
    return Scores(gates, ranking)


def _limit_groups(ranking_STE: Tensor, router: Router) -> Tensor:
    grouped_STGE = ranking_STE.unflatten(-1, (router.groups, -1))
    if router.group_score == "max":
        value_STG = grouped_STGE.amax(dim=-1)
    else:
        value_STG = grouped_STGE.topk(2, dim=-1)[0].sum(dim=-1)
    used_STG = value_STG.topk(router.groups_used, dim=-1, sorted=False)[1]
    excluded_STG = torch.ones_like(value_STG, dtype=torch.bool).scatter_(-1, used_STG, False)
    return grouped_STGE.masked_fill(excluded_STG.unsqueeze(-1), NEVER).flatten(-2)
