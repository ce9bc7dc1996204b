"""GPU routing: what `leanmoe.routing.route` computes for one step, and the expert blocks with it.

Letters: T tokens, K slots a token, E experts. One launch where a token's experts are its own
business, two where tokens share them; sizes depend on T, K and E alone, nothing waits for the
device: it can be captured in a graph and replayed with other logits and padding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.triton.expert_blocks import ExpertBlocks, most_blocks
from leanmoe.kernels.triton.launch import interprets
from leanmoe.kernels.triton.state import power_of_two, zeros_for
from leanmoe.models.routers import SCORINGS, Router
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement

MOST_EXPERTS = 1024
MOST_TOKENS = 16_384
MOST_TOKENS_OF_ALL = 1 << 18
"""Of all ranks, where they exchange their demand; whoever makes an exchange checks it. Votes then
have 51 bits and the id of one of `MOST_EXPERTS` has 10: together the 61 that are searched."""
BLOCK_ROWS = 16
NO_BLOCKS = 0
BEST, GUARANTEED, VOTES = range(3)
"""Rows of the demand (3,E), int64, as in `leanmoe.routing.batch_rules`."""
Exchange = Callable[[Tensor], Tensor]
"""Adds up the demand (3,E) of all ranks, as `leanmoe.routing.BatchScope.exchange`."""


class RoutedGpu(NamedTuple):
    """As `leanmoe.routing.Routing` for one step; a skipped slot has id E and weight 0."""

    ids_TK: Tensor
    """Best ranked first, skipped slots last."""
    weights_TK: Tensor
    """float32."""
    over_budget: Tensor | None
    """Where a budget is set: a bool of no dimensions, on the device."""
    blocks: ExpertBlocks


def route_gpu_unsupported(logits_TE: Tensor, router: Router, rule: Rule) -> str | None:
    """Why `route_gpu` cannot route these tokens; None if it can."""
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
    logits_TE: Tensor, router: Router, top_k: int, rule: Rule, bias_E: Tensor | None = None,
    padding_T: Tensor | None = None, placement: Placement | None = None,
    exchange: Exchange | None = None, *,
    block_rows: int = BLOCK_ROWS, ids_dtype: torch.dtype = torch.int64,
) -> RoutedGpu:  # fmt: skip
    """As `leanmoe.routing.route`, for what `route_gpu_unsupported` has nothing against.

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
    over_budget = over.view(torch.bool) if rule.has_budget else None
    return RoutedGpu(ids, weights, over_budget, ExpertBlocks(rows, table, used_1, block_rows))


def route_gpu_ids(
    logits_TE: Tensor, router: Router, top_k: int, rule: Rule, bias_E: Tensor | None = None,
    padding_T: Tensor | None = None, placement: Placement | None = None,
    exchange: Exchange | None = None, *,
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
    logits_TE: Tensor, router: Router, top_k: int, rule: Rule, bias_E: Tensor | None,
    padding_T: Tensor | None, scope: tuple[Placement | None, Exchange | None],
    output: tuple[bool, int, int], ids_dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`output`: whether a skipped slot repeats, its id if not, rows of the expert blocks."""
    placement, exchange = scope
    ranks = 1 if placement is None else placement.ranks
    rule = rule.on(ranks)
    if reason := route_gpu_unsupported(logits_TE, router, rule):
        raise LeanMoeError(f"route_gpu cannot route these tokens: {reason}")
    experts, device = logits_TE.shape[1], logits_TE.device
    rank_E = None
    if rule.budget_per_rank is not None and placement is not None:
        placement.check(experts)
        rank_E = _rank_of(placement, device)
    arguments = (
        logits_TE.contiguous(),
        None if bias_E is None else bias_E.to(torch.float32).contiguous(),
        None if rule.experts is None else _allowed(rule.experts, experts, device),
        None if padding_T is None else padding_T.contiguous().view(torch.int8),
        rank_E,
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


class RouteIntegers(NamedTuple):
    """The whole numbers of a router, a rule and the output; flags are 0 or 1."""

    scoring: int
    """Its place in `SCORINGS`."""
    normalise: int
    groups: int
    """1 where no groups are limited."""
    groups_used: int
    by_best: int
    """Whether a group is as good as its best expert, not as its best two."""
    slots: int
    full: int
    """Slots of the whole top-k where its sum divides the weights; else 0."""
    has_threshold: int
    has_top_p: int
    guaranteed: int
    """This and the budgets are 0 where the rule has none."""
    budget: int
    per_rank: int
    ranks: int
    repeat: int
    """Whether a skipped slot repeats the token's best expert."""
    skipped_id: int
    block_rows: int


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


def _whole(full: int, renormalise: float) -> int:
    """Whose sum divides the weights, as the programs number it."""
    from leanmoe.kernels.triton.router_token_program import BOTH, KEPT_SLOTS, WHOLE_TOP_K

    if not full:
        return int(KEPT_SLOTS.value)
    return int((BOTH if renormalise > 0 else WHOLE_TOP_K).value)


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


class RouteCall:
    """One call of the route programs; arguments are checked by `route_gpu`."""

    def __init__(
        self, logits_TE: Tensor, bias_E: Tensor | None, allowed_E: Tensor | None,
        padding_T: Tensor | None, rank_E: Tensor | None, integers: RouteIntegers,
        floats: list[float], outputs: tuple[Tensor, ...], exchange: Exchange | None = None,
    ) -> None:  # fmt: skip
        """`floats` are those of `_floats`."""
        self._rank_E, self._exchange = rank_E, exchange
        self.tokens, self.experts = logits_TE.shape
        self._inputs = (logits_TE, bias_E, allowed_E, padding_T)
        self._integers, self._floats, self._outputs = integers, floats, outputs
        size, full = self.experts // integers.groups, integers.full
        # fmt: off
        self._options = {
            "E": self.experts, "SIZE": size, "PADDED_SIZE": power_of_two(size),
            "GROUPS": integers.groups, "USED": integers.groups_used,
            "PADDED_E": power_of_two(integers.groups) * power_of_two(size),
            "BY_BEST": bool(integers.by_best), "SLOTS": power_of_two(max(integers.slots, full)),
            "SCORING": integers.scoring, "NORMALISE": bool(integers.normalise),
            "HAS_BIAS": bias_E is not None, "HAS_ALLOWED": allowed_E is not None,
            "HAS_PADDING": padding_T is not None, "WHOLE": _whole(full, floats[-1]),
            "HAS_THRESHOLD": bool(integers.has_threshold), "HAS_TOP_P": bool(integers.has_top_p),
            "num_warps": 1,
        }
        # fmt: on

    def run(self, program: Any, *arguments: Any, **options: Any) -> None:
        """Launches a program over the tokens."""
        program[(self.tokens,)](*arguments, **self._options, **options)

    def route(self) -> None:
        """Fills in the outputs."""
        from leanmoe.kernels.triton.router_program import (
            BEST_BIT,
            BEST_BIT_OF_ALL,
            COUNTER_STRIDE,
            route_activate,
            route_alone,
            route_fill,
        )

        ids, weights, over, rows, table, used_1 = self._outputs
        device, experts = ids.device, self.experts
        # A program wants some pointer even where it never reads it.
        inputs = [self._inputs[0] if tensor is None else tensor for tensor in self._inputs]
        counts = zeros_for("route", (experts + 1) * COUNTER_STRIDE.value, device)
        outputs = (ids, weights, counts, rows, table, used_1)
        numbers, floats = self._integers, self._floats
        blocks = {
            "BLOCK_ROWS": numbers.block_rows,
            "POWER_E": power_of_two(experts),
            "REPEAT": bool(numbers.repeat),
            "SKIPPED": numbers.skipped_id,
            "HAS_BLOCKS": numbers.block_rows > 0,
        }
        wanted, budgets = (numbers.slots, numbers.full), (numbers.budget, numbers.per_rank)
        sizes = (self.tokens, table.shape[1], *wanted)
        has_guaranteed, has_budget = numbers.guaranteed > 0, any(budgets)
        if not (has_guaranteed or has_budget):
            self.run(route_alone, *inputs, *outputs, *sizes, *floats, **blocks)
            return
        name, dtype = ("votes", torch.int64) if has_budget else ("marks", torch.int32)
        marks = zeros_for(name, experts, device, dtype)
        has_overlap = not interprets() and self._exchange is None
        self.run(
            route_activate, *inputs, marks, *wanted, numbers.guaranteed, *floats[:3],
            HAS_GUARANTEED=has_guaranteed, HAS_BUDGET=has_budget, USE_PDL=has_overlap,
        )  # fmt: skip
        tokens, best_bit = self.tokens, BEST_BIT.value
        if self._exchange is not None:
            tell_others(marks, self._exchange)
            tokens, best_bit = MOST_TOKENS_OF_ALL, BEST_BIT_OF_ALL.value
        low_bits = 3 + (tokens - 1).bit_length()  # votes, 2^32 and one a token, leave 30 bits above
        after = {"launch_pdl": True} if has_overlap else {}
        self.run(
            route_fill, *inputs, *outputs, marks, over,
            marks if self._rank_E is None else self._rank_E, *sizes, *floats,
            numbers.guaranteed, *budgets, numbers.ranks, low_bits, **blocks,
            BEST=best_bit, HAS_GUARANTEED=has_guaranteed, HAS_TOTAL=numbers.budget > 0,
            HAS_PER_RANK=numbers.per_rank > 0, USE_PDL=has_overlap, **after,
        )  # fmt: skip


def tell_others(marks_E: Tensor, exchange: Exchange) -> None:
    """Makes of the marks of this rank's tokens those of all ranks', in place.

    The fields of a mark travel apart: added up in one word, two ranks' would run into each other.
    """
    from leanmoe.kernels.triton.router_program import BEST_BIT, BEST_BIT_OF_ALL, GUARANTEED_BIT

    best, guaranteed = BEST_BIT.value, GUARANTEED_BIT.value
    demand_3E = marks_E.new_zeros((3, *marks_E.shape), dtype=torch.int64)
    if marks_E.dtype is not torch.int64:  # guaranteed alone
        demand_3E[GUARANTEED] = marks_E
        marks_E.copy_(exchange(demand_3E)[GUARANTEED] > 0)
        return
    demand_3E[GUARANTEED] = marks_E >> guaranteed
    demand_3E[BEST] = (marks_E & ((1 << guaranteed) - 1)) >> best
    demand_3E[VOTES] = marks_E & ((1 << best) - 1)
    total_3E = exchange(demand_3E)
    is_marked_3E = (total_3E > 0).long()
    marks_E.copy_(total_3E[VOTES])
    marks_E += is_marked_3E[BEST] << BEST_BIT_OF_ALL.value
    marks_E += is_marked_3E[GUARANTEED] << guaranteed


_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("leanmoe::route_gpu", mutates_args=())
def _route_op(
    logits: Tensor, bias: Tensor | None, allowed: Tensor | None, padding: Tensor | None,
    ranks: Tensor | None, integers: list[int], floats: list[float], ids_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _route(logits, bias, allowed, padding, ranks, integers, floats, ids_dtype, None)


def _route(
    logits: Tensor, bias: Tensor | None, allowed: Tensor | None, padding: Tensor | None,
    ranks: Tensor | None, integers: list[int], floats: list[float], ids_dtype: torch.dtype,
    exchange: Exchange | None,
) -> _Outputs:  # fmt: skip
    outputs = _empty(logits, integers, ids_dtype)
    if logits.shape[0]:
        inputs = (logits, bias, allowed, padding, ranks)
        RouteCall(*inputs, RouteIntegers(*integers), floats, outputs, exchange).route()
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
