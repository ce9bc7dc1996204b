"""Router logits to ids, weights and the work list: one launch, two where tokens share experts.

Letters: T tokens, K slots a token, L slots looked at, E experts.

Where tokens share experts the first launch marks whom they want, its last program decides who is
awake, and the second launch chooses among these. Whatever is counted is zero again at the end.
"""

# mypy: ignore-errors
# Triton's language is not Python's: names are constexprs, tensors or pointers as they are used.

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from leanmoe.kernels.gpu.route_token_program import (
    ASLEEP,
    FIRST,
    best_slots,
    expert_of,
    gates_of,
    own_slots,
    shares_of,
    whole_of,
)
from leanmoe.kernels.gpu.work_program import is_last, write_blocks

VOTE_UNIT = tl.constexpr(4294967296.0)
"""Votes are added as whole numbers: the order of the tokens cannot change a sum."""
BEST = tl.constexpr(1 << 62)
"""Above every expert's votes."""


@triton.jit
def _write(
    ids_L, gates_L, kept, whole, is_number, token, tokens, scaling, epsilon, slots,
    ids_ptr, weights_ptr, counts_ptr, rows_ptr, padding_ptr,
    E: tl.constexpr, SLOTS: tl.constexpr, SCORING: tl.constexpr, NORMALISE: tl.constexpr,
    HAS_PADDING: tl.constexpr, KEEP_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """A token's ids and weights, kept slots first, and its rows in the work list."""
    k = tl.arange(0, SLOTS)
    is_kept = k < kept
    if not KEEP_WEIGHTS:
        whole = whole_of(gates_L, is_kept, epsilon, SCORING, NORMALISE)
    weights_L = shares_of(gates_L, is_kept, whole, SCORING) * scaling
    is_nan = ~is_number
    if HAS_PADDING:
        is_nan = is_nan & (tl.load(padding_ptr + token) == 0)
    # NaN in, NaN out: whoever looks at the result must see it.
    weights_L = tl.where(is_nan, float("nan"), weights_L)
    is_kept = is_kept | is_nan
    ids_L = tl.where(is_nan, k % E, ids_L)
    at = token * slots + k
    tl.store(ids_ptr + at, tl.where(is_kept, ids_L, E).to(ids_ptr.dtype.element_ty), mask=k < slots)
    tl.store(weights_ptr + at, weights_L, mask=k < slots)
    is_row = is_kept & (k < slots)
    place_L = tl.atomic_add(counts_ptr + ids_L, 1, mask=is_row, sem="relaxed")
    tl.store(rows_ptr + ids_L * tokens + place_L, at.to(tl.int32), mask=is_row)


@triton.jit
def _finish(
    counts_ptr, blocks_ptr, used_ptr, tokens, most_blocks,
    E: tl.constexpr, ROWS: tl.constexpr, POWER_E: tl.constexpr,
):  # fmt: skip
    """The last program's: blocks from counts, and the counts zero again."""
    e = tl.arange(0, POWER_E)
    counts_E = tl.load(counts_ptr + e, mask=e < E, other=0, cache_modifier=".cg")
    write_blocks(counts_E, e * tokens, blocks_ptr, used_ptr, most_blocks, ROWS, POWER_E)
    tl.debug_barrier()
    tl.store(counts_ptr + e, 0, mask=e < E)


@triton.jit(do_not_specialize=["tokens", "most_blocks", "slots", "full"])
def route_alone(
    logits_ptr, bias_ptr, allowed_ptr, padding_ptr,
    ids_ptr, weights_ptr, counts_ptr, rows_ptr, blocks_ptr, used_ptr,
    tokens, most_blocks, slots, full, threshold, top_p, epsilon, scaling,
    E: tl.constexpr, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, GROUPS: tl.constexpr,
    PADDED_E: tl.constexpr, USED: tl.constexpr, BY_BEST: tl.constexpr, SLOTS: tl.constexpr,
    SCORING: tl.constexpr, NORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALLOWED: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_THRESHOLD: tl.constexpr,
    HAS_TOP_P: tl.constexpr, KEEP_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr, POWER_E: tl.constexpr,
):  # fmt: skip
    """Rules under which a token's experts are its own business: everything, in one launch."""
    token = tl.program_id(0)
    _keys, ids_L, gates_L, kept, _top, _total, whole, is_number = own_slots(
        logits_ptr, bias_ptr, allowed_ptr, padding_ptr, token,
        threshold, top_p, epsilon, slots, full,
        E, SIZE, PADDED_SIZE, GROUPS, PADDED_E, USED, BY_BEST, SLOTS, SCORING, NORMALISE,
        HAS_BIAS, HAS_ALLOWED, HAS_PADDING, HAS_THRESHOLD, HAS_TOP_P, KEEP_WEIGHTS,
    )  # fmt: skip
    _write(
        ids_L, gates_L, kept, whole, is_number, token, tokens, scaling, epsilon, slots,
        ids_ptr, weights_ptr, counts_ptr, rows_ptr, padding_ptr,
        E, SLOTS, SCORING, NORMALISE, HAS_PADDING, KEEP_WEIGHTS,
    )  # fmt: skip
    if is_last(counts_ptr + E, tokens):
        _finish(counts_ptr, blocks_ptr, used_ptr, tokens, most_blocks, E, ROWS, POWER_E)


@triton.jit
def _afford(
    votes_ptr, marks_ptr, awake_ptr, over_ptr, budget,
    E: tl.constexpr, POWER_E: tl.constexpr, HAS_GUARANTEED: tl.constexpr,
):  # fmt: skip
    """Every token's best stay awake, and the most voted-for while the budget lasts."""
    e = tl.arange(0, POWER_E)
    marks_E = tl.load(marks_ptr + e, mask=e < E, other=0, cache_modifier=".cg")
    votes_E = tl.load(votes_ptr + e, mask=e < E, other=0, cache_modifier=".cg")
    is_best_E = marks_E >= 2
    if HAS_GUARANTEED:
        votes_E = tl.where(marks_E > 0, votes_E, 0)
    tl.store(over_ptr, (tl.sum(is_best_E.to(tl.int32), axis=0) > budget).to(tl.int8))
    # All different, so the budget-th largest says who is in.
    lower_E = (POWER_E - 1 - e).to(tl.int64)
    order_E = tl.where(is_best_E, BEST + lower_E, votes_E * POWER_E + lower_E)
    sorted_E = tl.sort(order_E, descending=True)
    least = tl.sum(tl.where(e == budget - 1, sorted_E, 0), axis=0)
    is_awake_E = is_best_E | ((order_E >= least) & (votes_E > 0))
    tl.store(awake_ptr + e, is_awake_E.to(tl.int32), mask=e < E)
    tl.store(votes_ptr + e, tl.zeros((POWER_E,), dtype=tl.int64), mask=e < E)


@triton.jit(do_not_specialize=["tokens", "slots", "full", "guaranteed", "budget"])
def route_wake(
    logits_ptr, bias_ptr, allowed_ptr, padding_ptr, votes_ptr, marks_ptr, awake_ptr, over_ptr,
    tokens, slots, full, guaranteed, budget, threshold, top_p, epsilon,
    E: tl.constexpr, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, GROUPS: tl.constexpr,
    PADDED_E: tl.constexpr, USED: tl.constexpr, BY_BEST: tl.constexpr, SLOTS: tl.constexpr,
    SCORING: tl.constexpr, NORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALLOWED: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_THRESHOLD: tl.constexpr,
    HAS_TOP_P: tl.constexpr, KEEP_WEIGHTS: tl.constexpr,
    HAS_GUARANTEED: tl.constexpr, HAS_BUDGET: tl.constexpr, POWER_E: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """First of two launches: each token marks the experts it wants; the last decides who wakes.

    `marks`: 1 for an expert guaranteed to a token, 2 more for a token's best; after the experts'
    marks lies the counter of programs. Without a budget the marks themselves say who is awake.
    """
    if PDL:
        gdc_launch_dependents()
    token = tl.program_id(0)
    k = tl.arange(0, SLOTS)
    _keys, ids_L, gates_L, kept, _top, _total, _whole, _is_number = own_slots(
        logits_ptr, bias_ptr, allowed_ptr, padding_ptr, token,
        threshold, top_p, epsilon, slots, full,
        E, SIZE, PADDED_SIZE, GROUPS, PADDED_E, USED, BY_BEST, SLOTS, SCORING, NORMALISE,
        HAS_BIAS, HAS_ALLOWED, HAS_PADDING, HAS_THRESHOLD, HAS_TOP_P, KEEP_WEIGHTS,
    )  # fmt: skip
    is_kept = k < kept
    if HAS_BUDGET:
        whole = whole_of(gates_L, is_kept, epsilon, SCORING, NORMALISE)
        shares_L = shares_of(gates_L, is_kept, whole, SCORING)
        votes_L = (shares_L * VOTE_UNIT).to(tl.int64) + 1  # a slot counts, however small its gate
        tl.atomic_add(votes_ptr + ids_L, votes_L, mask=is_kept, sem="relaxed")
        tl.atomic_or(marks_ptr + ids_L, 2, mask=is_kept & (k == 0), sem="relaxed")
    if HAS_GUARANTEED:
        tl.atomic_or(marks_ptr + ids_L, 1, mask=is_kept & (k < guaranteed), sem="relaxed")
    if is_last(marks_ptr + E, tokens):
        e = tl.arange(0, POWER_E)
        if HAS_BUDGET:
            _afford(votes_ptr, marks_ptr, awake_ptr, over_ptr, budget, E, POWER_E, HAS_GUARANTEED)
        else:
            marks_E = tl.load(marks_ptr + e, mask=e < E, other=0, cache_modifier=".cg")
            tl.store(awake_ptr + e, marks_E, mask=e < E)
        tl.debug_barrier()
        tl.store(marks_ptr + e, 0, mask=e < E)


@triton.jit(do_not_specialize=["tokens", "most_blocks", "slots", "full"])
def route_fill(
    logits_ptr, bias_ptr, allowed_ptr, padding_ptr,
    ids_ptr, weights_ptr, counts_ptr, rows_ptr, blocks_ptr, used_ptr, awake_ptr,
    tokens, most_blocks, slots, full, threshold, top_p, epsilon, scaling,
    E: tl.constexpr, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, GROUPS: tl.constexpr,
    PADDED_E: tl.constexpr, USED: tl.constexpr, BY_BEST: tl.constexpr, SLOTS: tl.constexpr,
    SCORING: tl.constexpr, NORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALLOWED: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_THRESHOLD: tl.constexpr,
    HAS_TOP_P: tl.constexpr, KEEP_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr, POWER_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Second of two launches: each token's slots from its own awake experts, then from the others.

    Its own experts are found again: that takes less than to write and read them.
    """
    token = tl.program_id(0)
    keys, ids_L, _gates_L, wanted, top, total, whole, is_number = own_slots(
        logits_ptr, bias_ptr, allowed_ptr, padding_ptr, token,
        threshold, top_p, epsilon, slots, full,
        E, SIZE, PADDED_SIZE, GROUPS, PADDED_E, USED, BY_BEST, SLOTS, SCORING, NORMALISE,
        HAS_BIAS, HAS_ALLOWED, HAS_PADDING, HAS_THRESHOLD, HAS_TOP_P, KEEP_WEIGHTS,
    )  # fmt: skip
    k = tl.arange(0, SLOTS)
    e, _is_expert = expert_of(SIZE, PADDED_SIZE, GROUPS, PADDED_E)
    if HAS_THRESHOLD and HAS_BIAS:  # else what it keeps are its best anyway
        slot = 0
        while slot < wanted:
            own = tl.sum(tl.where(k == slot, ids_L, 0), axis=0)
            keys = tl.where(e == own, FIRST - slot, keys)
            slot += 1
    if PDL:
        gdc_wait()
    awake = tl.load(awake_ptr + e, mask=keys > ASLEEP, other=0, cache_modifier=".cg")
    ids_L, found = best_slots(tl.where(awake != 0, keys, ASLEEP), e, wanted, SLOTS)
    gates_L = gates_of(logits_ptr, token, ids_L, k < found, top, total, E, SCORING)
    _write(
        ids_L, gates_L, found, whole, is_number, token, tokens, scaling, epsilon, slots,
        ids_ptr, weights_ptr, counts_ptr, rows_ptr, padding_ptr,
        E, SLOTS, SCORING, NORMALISE, HAS_PADDING, KEEP_WEIGHTS,
    )  # fmt: skip
    if is_last(counts_ptr + E, tokens):
        _finish(counts_ptr, blocks_ptr, used_ptr, tokens, most_blocks, E, ROWS, POWER_E)
