"""Router logits to gates (what an expert weighs) and ranking (what decides which are picked).

`order_keys` puts a token's experts in one definite order: by ranking, equal ones by lower id.
torch.topk breaks ties differently on each device. A token on its own may follow the family's own
call there; under a batch-aware rule all tokens must agree on which expert comes first.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.routers import Router

NEVER = float("-inf")


class Scores(NamedTuple):
    """One value per token and expert, both of the logits' shape, in the router's score dtype."""

    gates_BTE: Tensor
    """What a picked expert weighs, before normalising and scaling."""
    ranking_BTE: Tensor
    """What ranks the experts: bias included; -inf where groups or `experts` exclude one."""


def score(
    logits_BTE: Tensor,
    router: Router,
    bias_E: Tensor | None = None,
    experts: tuple[int, ...] | None = None,
) -> Scores:
    """Scores as the family computes them; `experts` are those that remain, None for all.

    With `experts` they are those of the same model without the others: its softmax runs over the
    remaining ones.

    The bias ranks and does not weigh (DeepSeek-V3 report, section 2.1.2). Group limits follow
    DeepSeek-V2 (a group is as good as its best expert) or V3 (as its best two added up).
    """
    dtype = score_dtype(router, logits_BTE)
    if router.scoring == "softmax_after_top_k":
        gates = ranking = logits_BTE
    elif router.scoring == "sigmoid":
        gates = ranking = logits_BTE.to(dtype).sigmoid()
    elif router.scoring == "sqrtsoftplus":
        gates = ranking = functional.softplus(logits_BTE.to(dtype)).sqrt()
    elif experts is None:
        gates = ranking = torch.softmax(logits_BTE, dim=-1, dtype=dtype)
    else:  # a pruned model's softmax knows nothing of the experts that are gone
        kept, _ = _remaining(experts, logits_BTE.shape[-1], logits_BTE.device)
        shares = torch.softmax(logits_BTE[..., kept], dim=-1, dtype=dtype)
        gates = ranking = torch.zeros_like(logits_BTE, dtype=dtype).index_copy(-1, kept, shares)
    if bias_E is not None:
        ranking = ranking + bias_E
    if experts is not None:
        _, pruned_E = _remaining(experts, logits_BTE.shape[-1], logits_BTE.device)
        ranking = ranking.masked_fill(pruned_E, NEVER)
    if router.limits_groups:
        ranking = _limit_groups(ranking, router, experts is not None)
    return Scores(gates, ranking)


def score_dtype(router: Router, logits_BTE: Tensor) -> torch.dtype:
    """The dtype in which the family computes its scores."""
    return torch.float32 if router.score_dtype == "float32" else logits_BTE.dtype


def check_logits(logits_BTE: Tensor, where: str, padding_BT: Tensor | None = None) -> None:
    """Raises LeanMoeError naming `where` if a token that is no padding has no usable logits.

    That is NaN, positive infinity, or nothing but negative infinity. Waits for the device, so it
    is the caller's to decide when: `route` itself never checks.
    """
    usable_BT = logits_BTE.amax(dim=-1).isfinite()  # the maximum of anything and NaN is NaN
    if padding_BT is not None:
        usable_BT = usable_BT | padding_BT
    if not bool(usable_BT.all()):
        raise LeanMoeError(f"{where}: router logits are not finite (NaN or infinity)")


@lru_cache(maxsize=256)
def _remaining(experts: tuple[int, ...], count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The ids that remain, and True [E] for those that do not; kept for the next steps."""
    with torch.inference_mode(False):
        kept = torch.tensor(experts, device=device)
        return kept, torch.ones(count, dtype=torch.bool, device=device).index_fill(0, kept, False)


def _limit_groups(ranking_BTE: Tensor, router: Router, some_pruned: bool) -> Tensor:
    *tokens, experts = ranking_BTE.shape
    grouped_BTGE = ranking_BTE.reshape(*tokens, router.groups, experts // router.groups)
    if router.group_score == "max":
        value_BTG = grouped_BTGE.amax(dim=-1)
    else:
        best_BTG2 = grouped_BTGE.topk(2, dim=-1)[0]
        if some_pruned:  # a group with one expert left is as good as that one
            best_BTG, second_BTG = best_BTG2.unbind(-1)
            value_BTG = best_BTG + second_BTG.masked_fill(second_BTG == NEVER, 0.0)
        else:
            value_BTG = best_BTG2.sum(dim=-1)
    used_BTG = value_BTG.topk(router.groups_used, dim=-1, sorted=False)[1]
    excluded_BTG = torch.ones_like(value_BTG, dtype=torch.bool).scatter_(-1, used_BTG, False)
    return grouped_BTGE.masked_fill(excluded_BTG.unsqueeze(-1), NEVER).flatten(-2)


NOT_USABLE = torch.iinfo(torch.int64).min
"""A key below every other: the expert is not active."""
_LOWEST_BITS = -2139095040  # what `_ordered_bits` makes of the smallest finite float32
_FIRST = 1 << 50  # above every key: int32 bits x experts


def order_keys(ranking_BTE: Tensor) -> Tensor:
    """Whole numbers [B,T,E], all different in a token, that order experts as the ranking does.

    The float32's bits as an integer that sorts like the float, followed by the id, lower better.
    NaN ranks first, whatever its sign, so that whoever looks at the weights sees it.
    """
    experts = ranking_BTE.shape[-1]
    ranking = ranking_BTE.float() + 0.0  # minus zero equals zero
    bits = torch.where(ranking.isnan(), float("inf"), ranking).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return torch.add(lower_first(experts, ranking_BTE.device), bits, alpha=experts)


@lru_cache(maxsize=64)
def lower_first(experts: int, device: torch.device) -> Tensor:
    """E-1 to 0 [E]: added to a value times E, it decides between equal values."""
    with torch.inference_mode(False):
        return torch.arange(experts - 1, -1, -1, device=device)


def is_usable(keys: Tensor, experts: int) -> Tensor:
    """True where a key belongs to an expert the token may use (active, and ranked above -inf)."""
    return keys >= _LOWEST_BITS * experts


def put_first(keys_BTE: Tensor, ids_BTK: Tensor, chosen_BTK: Tensor) -> Tensor:
    """Keys that rank a token's chosen slots above all its other experts, in their own order."""
    raised_BTK = keys_BTE.gather(-1, ids_BTK) + chosen_BTK * _FIRST
    return keys_BTE.scatter(-1, ids_BTK, raised_BTK)
