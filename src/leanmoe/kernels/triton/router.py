"""GPU routing: what `leanmoe.routing.route` computes for one step, and the expert blocks with it.

Letters: T tokens, K slots a token, E experts. One launch where a token's experts are its own
business, two where tokens share them; sizes depend on T, K and E alone, nothing waits for the
device: it can be captured in a graph and replayed with other logits and padding.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.rule_words import TokenRules, needed
from leanmoe.kernels.triton.expert_blocks import ExpertBlocks, most_blocks
from leanmoe.kernels.triton.launch import interprets
from leanmoe.kernels.triton.route_call import Exchange, RouteCall, RouteIntegers, RowWords
from leanmoe.models.routers import SCORINGS, Router
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement

MOST_EXPERTS = 1024
MOST_TOKENS = 16_384
BLOCK_ROWS = 16
NO_BLOCKS = 0


class RoutedGpu(NamedTuple):
    """As `leanmoe.routing.Routing` for one step; a skipped slot has id E and weight 0."""

    ids_TK: Tensor
    """Best ranked first, skipped slots last."""
    weights_TK: Tensor
    """float32."""
    over_budget: Tensor | None
    """Where a budget is set: a bool of no dimensions, on the device."""
    blocks: ExpertBlocks


def route_gpu_unsupported(logits_TE: Tensor, router: Router, rule: Rule | TokenRules) -> str | None:
    """Why `route_gpu` cannot route these tokens; None if it can."""
    rule = needed(rule)
    if logits_TE.device.type != "cuda" and not interprets():
        return f"the logits are on {logits_TE.device}"
    if logits_TE.dim() != 2:
        return f"the logits have {logits_TE.dim()} dimensions: one step has 2"
    if router.score_dtype == "logits" and logits_TE.dtype is not torch.float32:
        return f"the family scores in {logits_TE.dtype}"
    if rule.top_k == 0:
        return "nothing is routed"
    if router.zero_experts and rule.is_batch_aware:
        return "experts that compute nothing are the reference's alone"
    tokens, experts = logits_TE.shape
    if experts > MOST_EXPERTS:
        return f"{experts} experts are more than {MOST_EXPERTS}"
    if tokens > MOST_TOKENS:
        return f"{tokens} tokens are more than {MOST_TOKENS}"
    return None


def route_gpu(
    logits_TE: Tensor, router: Router, top_k: int, rule: Rule | TokenRules,
    bias_E: Tensor | None = None, padding_T: Tensor | None = None,
    placement: Placement | None = None, exchange: Exchange | None = None, *,
    block_rows: int = BLOCK_ROWS, ids_dtype: torch.dtype = torch.int64,
) -> RoutedGpu:  # fmt: skip
    """As `leanmoe.routing.route`, for what `route_gpu_unsupported` has nothing against.

    With `TokenRules` as `leanmoe.routing.route_rows`: rules, band and rule rows are read as the
    programs run, so that they may change between the replays of a graph.

    Scores may differ from torch's in the last bits, and with them the order of experts that are as
    good as equal. Equal ones: the lower id first, and so for groups. A token whose logits are not
    numbers gets NaN weights. `block_rows` are the rows of the expert blocks (the experts'
    config has them). `placement` says on which rank each expert is, for `budget_per_rank`;
    `exchange` is called between the two launches, and without tokens too. Raises LeanMoeError for
    what it cannot route.
    """
    inputs = (logits_TE, router, top_k, rule, bias_E, padding_T, (placement, exchange))
    skipped = (False, logits_TE.shape[-1])
    ids, weights, over, rows, table, used_1 = _call(*inputs, (*skipped, block_rows), ids_dtype)
    over_budget = over.view(torch.bool) if needed(rule).has_budget else None
    return RoutedGpu(ids, weights, over_budget, ExpertBlocks(rows, table, used_1, block_rows))


def route_gpu_ids(
    logits_TE: Tensor, router: Router, top_k: int, rule: Rule | TokenRules,
    bias_E: Tensor | None = None, padding_T: Tensor | None = None,
    placement: Placement | None = None, exchange: Exchange | None = None, *,
    skipped_id: int | None = None, ids_dtype: torch.dtype = torch.int32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Ids and weights (T,K) of `route_gpu`, for another's kernels; there are no expert blocks.

    For kernels that pass over some id, `skipped_id` is the id of every skipped slot and of all of a
    padding token's. For those that want an expert in every slot it is None: a skipped slot repeats
    the token's best expert with weight 0, and a padding token's slots that of the first token, so
    that neither activates an expert.
    """
    inputs = (logits_TE, router, top_k, rule, bias_E, padding_T, (placement, exchange))
    skipped = (skipped_id is None, skipped_id or 0)
    ids, weights, *_ = _call(*inputs, (*skipped, NO_BLOCKS), ids_dtype)
    return ids, weights


def _call(
    logits_TE: Tensor, router: Router, top_k: int, rule: Rule | TokenRules, bias_E: Tensor | None,
    padding_T: Tensor | None, scope: tuple[Placement | None, Exchange | None],
    output: tuple[bool, int, int], ids_dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`output`: whether a skipped slot repeats, its id if not, rows of the expert blocks."""
    placement, exchange = scope
    ranks = 1 if placement is None else placement.ranks
    if reason := route_gpu_unsupported(logits_TE, router, rule):
        raise LeanMoeError(f"route_gpu cannot route these tokens: {reason}")
    experts, device = logits_TE.shape[1], logits_TE.device
    words = band = rule_rows = None
    if isinstance(rule, TokenRules):
        rules, rule_rows_BT = rule
        if rules.ranks != ranks:
            raise LeanMoeError(
                f"a table of rules for {rules.ranks} ranks: the experts are on {ranks}"
            )
        words, band, rule_rows = rules.words, rules.band_1, rule_rows_BT.contiguous()
        allowed, rule = rules.masks if rules.needs.masks > 1 else None, rules.needs.rule
    else:
        rule = rule.on(ranks)
        allowed = None if rule.experts is None else _allowed(rule.experts, experts, device)
    rank_E = None
    if rule.budget_per_rank is not None and placement is not None:
        placement.check(experts)
        rank_E = _rank_of(placement, device)
    arguments = (
        logits_TE.contiguous(),
        None if bias_E is None else bias_E.to(torch.float32).contiguous(),
        allowed,
        None if padding_T is None else padding_T.contiguous().view(torch.int8),
        rank_E,
        words,
        band,
        rule_rows,
        list(_integers(router, rule, top_k, ranks, output)),
        _floats(router, rule),
        ids_dtype,
    )
    if not rule.is_batch_aware:
        exchange = None
    if exchange is None and torch.compiler.is_compiling():
        outputs: tuple[Tensor, ...] = _route_op(*arguments)
        return outputs
    return _route(*arguments, exchange)  # an op of torch would take longer than the launch


def _integers(
    router: Router, rule: Rule, top_k: int, ranks: int, output: tuple[bool, int, int]
) -> RouteIntegers:
    return RouteIntegers(
        SCORINGS.index(router.scoring),
        router.normalise,
        router.groups if router.limits_groups else 1,
        router.groups_used if router.limits_groups else 1,
        router.group_score == "max",
        top_k if rule.top_k is None else rule.top_k,
        top_k if rule.renormalise < 1 and router.normalises else 0,
        rule.threshold is not None,
        rule.top_p is not None,
        rule.guaranteed or 0,
        rule.budget or 0,
        rule.budget_per_rank or 0,
        ranks,
        *output,
    )


def _floats(router: Router, rule: Rule) -> list[float]:
    """Threshold, top_p, the epsilon of the normalisation, the scaling, and `renormalise`."""
    shares = [rule.threshold or 0.0, rule.top_p or 0.0]
    return [*shares, router.normalise_epsilon, router.scaling, float(rule.renormalise)]


@lru_cache(maxsize=1024)
def _allowed(remaining: tuple[int, ...], experts: int, device: torch.device) -> Tensor:
    """1 for experts that remain (int8, E); kept, since each step asks for the same."""
    with torch.inference_mode(False):
        allowed_E = torch.zeros(experts, dtype=torch.int8)
        allowed_E[list(remaining)] = 1
        return allowed_E.to(device)


@lru_cache(maxsize=64)
def _rank_of(placement: Placement, device: torch.device) -> Tensor:
    """The rank of each expert (int32, E); kept as above."""
    with torch.inference_mode(False):
        return torch.tensor(placement.rank_of, dtype=torch.int32).to(device)


_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("leanmoe::route_gpu", mutates_args=())
def _route_op(
    logits: Tensor, bias: Tensor | None, allowed: Tensor | None, padding: Tensor | None,
    ranks: Tensor | None, words: Tensor | None, band: Tensor | None, rule_rows: Tensor | None,
    integers: list[int], floats: list[float], ids_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = (logits, bias, allowed, padding, ranks, words, band, rule_rows)
    return _route(*inputs, integers, floats, ids_dtype, None)


def _route(
    logits: Tensor, bias: Tensor | None, allowed: Tensor | None, padding: Tensor | None,
    ranks: Tensor | None, words: Tensor | None, band: Tensor | None, rule_rows: Tensor | None,
    integers: list[int], floats: list[float], ids_dtype: torch.dtype, exchange: Exchange | None,
) -> _Outputs:  # fmt: skip
    outputs = _empty(logits, integers, ids_dtype)
    if logits.shape[0]:
        inputs = (logits, bias, allowed, padding, ranks)
        table = None
        if words is not None and band is not None and rule_rows is not None:
            table = RowWords(words, band, rule_rows)
        RouteCall(*inputs, RouteIntegers(*integers), floats, outputs, exchange, table).route()
        return outputs
    if exchange is not None:  # the others wait for this rank's demand, empty as it is
        exchange(torch.zeros(3, logits.shape[1], dtype=torch.int64, device=logits.device))
    outputs[2].zero_()
    outputs[5].zero_()
    return outputs


@_route_op.register_fake
def _route_fake(logits: Tensor, *others: Any) -> _Outputs:
    *_inputs, integers, _floats, ids_dtype = others
    return _empty(logits, integers, ids_dtype)


def _empty(logits: Tensor, integers: list[int], ids_dtype: torch.dtype) -> _Outputs:
    (tokens, experts), numbers = logits.shape, RouteIntegers(*integers)
    slots, block_rows = numbers.slots, numbers.block_rows
    rows, blocks = 0, 0
    if block_rows != NO_BLOCKS:
        rows, blocks = experts * tokens, most_blocks(tokens * slots, experts, block_rows)
    return (
        logits.new_empty(tokens, slots, dtype=ids_dtype),
        logits.new_empty(tokens, slots, dtype=torch.float32),
        logits.new_empty((), dtype=torch.int8),
        logits.new_empty(rows, dtype=torch.int32),
        logits.new_empty(3, blocks, dtype=torch.int32),
        logits.new_empty(1, dtype=torch.int32),
    )
