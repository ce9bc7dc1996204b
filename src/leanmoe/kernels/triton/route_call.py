"""One call of the route programs: what they are compiled for, what they are given, how many run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanmoe.kernels.triton.launch import interprets
from leanmoe.kernels.triton.state import power_of_two, zeros_for

MOST_TOKENS_OF_ALL = 1 << 18
"""Of all ranks, where they exchange their demand; whoever makes an exchange checks it. Votes then
have 51 bits and the id of one of `MOST_EXPERTS` has 10: together the 61 that are searched."""
BEST, GUARANTEED, VOTES = range(3)
"""Rows of the demand (3,E), int64, as in `leanmoe.routing.batch_rules`."""
Exchange = Callable[[Tensor], Tensor]
"""Adds up the demand (3,E) of all ranks, as `leanmoe.routing.BatchScope.exchange`."""


class RowWords(NamedTuple):
    """A table of rules, the band that is in force, and each token's row."""

    words: Tensor
    band_1: Tensor
    rule_rows_T: Tensor


NO_TABLE = (None, None, None, None)


class RouteIntegers(NamedTuple):
    """The whole numbers of a router, a rule and the output; flags are 0 or 1.

    Where rules are a table's, what a rule says is read from it: here it only says what some need.
    """

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


def _whole(full: int, renormalise: float) -> int:
    """Whose sum divides the weights, as the programs number it."""
    from leanmoe.kernels.triton.router_token_program import BOTH, KEPT_SLOTS, WHOLE_TOP_K

    if not full:
        return int(KEPT_SLOTS.value)
    return int((BOTH if renormalise > 0 else WHOLE_TOP_K).value)


class RouteCall:
    """One call of the route programs; arguments are checked by `route_gpu`."""

    def __init__(
        self, logits_TE: Tensor, bias_E: Tensor | None, allowed_E: Tensor | None,
        padding_T: Tensor | None, rank_E: Tensor | None, integers: RouteIntegers,
        floats: list[float], outputs: tuple[Tensor, ...], exchange: Exchange | None = None,
        table: RowWords | None = None,
    ) -> None:  # fmt: skip
        """`floats` are a threshold, a top_p, an epsilon, the scaling, and `renormalise`."""
        self._rank_E, self._exchange = rank_E, exchange
        self._table = NO_TABLE if table is None else (*table, table.words.shape[1])
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
            "TABLE": table is not None, "num_warps": 1,
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
            self.run(route_alone, *inputs, *outputs, *sizes, *floats, *self._table, **blocks)
            return
        name, dtype = ("votes", torch.int64) if has_budget else ("marks", torch.int32)
        marks = zeros_for(name, experts, device, dtype)
        has_overlap = not interprets() and self._exchange is None
        self.run(
            route_activate, *inputs, marks, *wanted, numbers.guaranteed, *floats[:3], *self._table,
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
            numbers.guaranteed, *budgets, numbers.ranks, low_bits, *self._table, **blocks,
            BEST=best_bit, HAS_GUARANTEED=has_guaranteed, HAS_TOTAL=numbers.budget > 0,
            HAS_PER_RANK=numbers.per_rank > 0, USE_PDL=has_overlap, **after,
        )  # fmt: skip


def tell_others(marks_E: Tensor, exchange: Exchange) -> None:
    """Makes of the marks of this rank's tokens those of all ranks', in place.

    The fields of a mark travel apart: added up in one word, two ranks' would run into each other.
    """
    from leanmoe.kernels.triton.router_budget_program import GUARANTEED_BIT
    from leanmoe.kernels.triton.router_program import BEST_BIT, BEST_BIT_OF_ALL

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
