"""Router logits to ids, weights and the work list: one launch, two where tokens share experts.

Letters: T tokens, K slots a token, L slots looked at, E experts.

Where tokens share experts, the first launch marks whom they want and the second chooses among
those that are awake by these marks. Whatever is counted is zero again at the end.
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
    gates_of,
    own_keys,
    own_slots,
    shares_of,
    whole_of,
)
from leanmoe.kernels.gpu.work_program import is_last_answered, write_blocks

COUNTER_STRIDE = tl.constexpr(8)
"""Counters of rows lie so far apart, 32 bytes: atomics on neighbours wait for each other."""

VOTE_UNIT = tl.constexpr(4294967296.0)
"""Votes are added as whole numbers: the order of the tokens cannot change a sum."""
BEST_BIT, GUARANTEED_BIT = tl.constexpr(47), tl.constexpr(62)
"""Of an expert's word. Below: the votes of 2^14 tokens; between: how many have it as their best.
One word for all of it, since every program reads every expert's."""
BEST_BIT_OF_ALL = tl.constexpr(61)
"""Where ranks told each other, whether any token has it as its best; below, votes of all ranks."""


@triton.jit
def _write(
    ids_L, gates_L, kept, whole, is_number, filler, token, tokens, scaling, epsilon, slots,
    ids_ptr, weights_ptr, counts_ptr, rows_ptr, padding_ptr,
    E: tl.constexpr, SLOTS: tl.constexpr, SCORING: tl.constexpr, NORMALISE: tl.constexpr,
    HAS_PADDING: tl.constexpr, KEEP_WEIGHTS: tl.constexpr, HAS_WORK: tl.constexpr,
):  # fmt: skip
    """A token's ids and weights, kept slots first, and its rows in the work list.

    `filler` is the id of a skipped slot. Returns what the experts' counters answered; without a
    work list the ids, which are known no earlier than whatever they were chosen by.
    """
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
    written_L = tl.where(is_kept, ids_L, filler).to(ids_ptr.dtype.element_ty)
    tl.store(ids_ptr + at, written_L, mask=k < slots)
    tl.store(weights_ptr + at, weights_L, mask=k < slots)
    is_row = is_kept & (k < slots)
    if HAS_WORK:
        count_at = counts_ptr + ids_L * COUNTER_STRIDE
        place_L = tl.atomic_add(count_at, 1, mask=is_row, sem="relaxed")
        tl.store(rows_ptr + ids_L * tokens + place_L, at.to(tl.int32), mask=is_row)
    else:
        place_L = ids_L
    return tl.where(is_row, place_L, 0)


@triton.jit
def _filler(
    ids_L, logits_ptr, bias_ptr, allowed_ptr, padding_ptr, token,
    E: tl.constexpr, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, GROUPS: tl.constexpr,
    PADDED_E: tl.constexpr, USED: tl.constexpr, BY_BEST: tl.constexpr, SLOTS: tl.constexpr,
    SCORING: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ALLOWED: tl.constexpr,
    HAS_PADDING: tl.constexpr, REPEAT: tl.constexpr, SKIPPED: tl.constexpr,
):  # fmt: skip
    """The id of a token's skipped slots: `SKIPPED`, or with `REPEAT` that of an expert that is
    awake anyway: the token's best; for padding, that of the first token.
    """
    filler = SKIPPED
    if REPEAT:
        filler = tl.sum(tl.where(tl.arange(0, SLOTS) == 0, ids_L, 0), axis=0)
        if HAS_PADDING:  # noqa: SIM102, constexpr: there is a pointer only with it
            if tl.load(padding_ptr + token) != 0:
                keys, e, _is_expert, _top, _total, _is_number = own_keys(
                    logits_ptr, bias_ptr, allowed_ptr, padding_ptr, 0,
                    E, SIZE, PADDED_SIZE, GROUPS, PADDED_E, USED, BY_BEST, SCORING,
                    HAS_BIAS, HAS_ALLOWED, False,
                )  # fmt: skip
                filler = tl.min(tl.where(keys == tl.max(keys, axis=0), e, E - 1), axis=0)
    return filler


@triton.jit
def _finish(
    counts_ptr, blocks_ptr, used_ptr, tokens, most_blocks,
    E: tl.constexpr, ROWS: tl.constexpr, POWER_E: tl.constexpr,
):  # fmt: skip
    """The last program's: blocks from counts, and the counts zero again."""
    e = tl.arange(0, POWER_E)[None, :]
    count_at = counts_ptr + e * COUNTER_STRIDE
    counts_1E = tl.load(count_at, mask=e < E, other=0, cache_modifier=".cg")
    tl.store(count_at, 0, mask=e < E)
    write_blocks(counts_1E, e * tokens, blocks_ptr, used_ptr, most_blocks, ROWS, POWER_E)


@triton.jit(do_not_specialize=["tokens", "most_blocks", "slots", "full"])
def route_alone(
    logits_ptr, bias_ptr, allowed_ptr, padding_ptr,
    ids_ptr, weights_ptr, counts_ptr, rows_ptr, blocks_ptr, used_ptr,
    tokens, most_blocks, slots, full, threshold, top_p, epsilon, scaling,
    E: tl.constexpr, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, GROUPS: tl.constexpr,
    PADDED_E: tl.constexpr, USED: tl.constexpr, BY_BEST: tl.constexpr, SLOTS: tl.constexpr,
    SCORING: tl.constexpr, NORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALLOWED: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_THRESHOLD: tl.constexpr,
    HAS_TOP_P: tl.constexpr, KEEP_WEIGHTS: tl.constexpr, REPEAT: tl.constexpr,
    SKIPPED: tl.constexpr, HAS_WORK: tl.constexpr, ROWS: tl.constexpr, POWER_E: tl.constexpr,
):  # fmt: skip
    """Rules under which a token's experts are its own business: everything, in one launch."""
    token = tl.program_id(0)
    keys, e, _is_expert, top, total, is_number = own_keys(
        logits_ptr, bias_ptr, allowed_ptr, padding_ptr, token,
        E, SIZE, PADDED_SIZE, GROUPS, PADDED_E, USED, BY_BEST, SCORING,
        HAS_BIAS, HAS_ALLOWED, HAS_PADDING,
    )  # fmt: skip
    most = tl.maximum(slots, full)
    ids_L, gates_L, kept, whole = own_slots(
        logits_ptr, token, keys, e, top, total, threshold, top_p, epsilon, slots, full, most,
        E, SLOTS, SCORING, NORMALISE, HAS_BIAS, HAS_THRESHOLD, HAS_TOP_P, KEEP_WEIGHTS,
    )  # fmt: skip
    filler = _filler(
        ids_L, logits_ptr, bias_ptr, allowed_ptr, padding_ptr, token,
        E, SIZE, PADDED_SIZE, GROUPS, PADDED_E, USED, BY_BEST, SLOTS, SCORING,
        HAS_BIAS, HAS_ALLOWED, HAS_PADDING, REPEAT, SKIPPED,
    )  # fmt: skip
    answers = _write(
        ids_L, gates_L, kept, whole, is_number, filler, token, tokens, scaling, epsilon, slots,
        ids_ptr, weights_ptr, counts_ptr, rows_ptr, padding_ptr,
        E, SLOTS, SCORING, NORMALISE, HAS_PADDING, KEEP_WEIGHTS, HAS_WORK,
    )  # fmt: skip
    if HAS_WORK:  # noqa: SIM102, constexpr: nothing is counted without it
        if is_last_answered(counts_ptr + E * COUNTER_STRIDE, tokens, answers):
            _finish(counts_ptr, blocks_ptr, used_ptr, tokens, most_blocks, E, ROWS, POWER_E)


@triton.jit
def _least_of_best(keys, number):
    """A whole number that `number` of the keys reach, and how many do: more where keys are equal.

    Found from the highest bit down, two bits a step: how many keys reach each of three values is
    counted in one sum, ten bits each. Keys have 30 bits; negative ones are none.
    """
    least, reached = 0, tl.sum((keys >= 0).to(tl.int32), axis=0)
    highest = tl.maximum(tl.max(keys, axis=0), 1).to(tl.float32)  # its exponent: where to begin
    shift = tl.minimum(((highest.to(tl.int32, bitcast=True) >> 23) - 127) // 2 * 2, 28)
    while (shift >= 0) & (reached > number):
        one = 1 << shift
        reach = (keys >= least + one).to(tl.int32)
        reach += (keys >= least + 2 * one).to(tl.int32) << 10
        reach += (keys >= least + 3 * one).to(tl.int32) << 20
        counts = tl.sum(reach, axis=0)
        times = ((counts & 1023) >= number).to(tl.int32)
        times += (((counts >> 10) & 1023) >= number).to(tl.int32)
        times += ((counts >> 20) >= number).to(tl.int32)
        reached = tl.where(times > 0, (counts >> (10 * times - 10)) & 1023, reached)
        least += times * one
        shift -= 2
    return least, reached


@triton.jit
def _most_voted(is_candidate, order, number, low_bits):
    """The `number` candidates that come highest in `order`, or all of them where they are fewer.

    The order has more than 32 bits, so the upper 30 are searched first and the `low_bits` only
    among equals there.
    """
    upper = tl.where(is_candidate, (order >> low_bits).to(tl.int32), -1)
    least, reached = _least_of_best(upper, number)
    is_in = is_candidate & (upper >= least)
    if reached > number:
        is_equal = is_candidate & (upper == least)
        is_in = is_candidate & (upper > least)
        mask = (tl.zeros_like(order) + 1 << low_bits) - 1
        lower = tl.where(is_equal, (order & mask).to(tl.int32), -1)
        missing = number - tl.sum(is_in.to(tl.int32), axis=0)
        least, _reached = _least_of_best(lower, missing)
        is_in = is_in | (is_equal & (lower >= least))
    return is_in & (number > 0)


@triton.jit
def _afford(
    marks, is_expert, e, rank_ptr, budget, per_rank, ranks, low_bits,
    E: tl.constexpr, BEST: tl.constexpr, HAS_GUARANTEED: tl.constexpr,
    HAS_TOTAL: tl.constexpr, HAS_PER_RANK: tl.constexpr,
):  # fmt: skip
    """Every token's best stay awake, and the most voted-for while the budgets last.

    Whole numbers in order: votes, then the lower id. A rank's budget comes first, one after the
    other, and that of all ranks among those that are left. Returns also whether the best alone
    are more than a budget.
    """
    one = tl.zeros_like(marks) + 1
    is_best = is_expert & (((marks & ((one << GUARANTEED_BIT) - 1)) >> BEST) > 0)
    votes = marks & ((one << BEST) - 1)
    order = votes * E + (E - 1 - e)
    is_in = is_expert & ~is_best & (votes > 0)
    if HAS_GUARANTEED:
        is_in = is_in & ((marks >> GUARANTEED_BIT) > 0)
    beyond = 0
    if HAS_PER_RANK:
        rank_E = tl.load(rank_ptr + e, mask=is_expert, other=-1)
        is_candidate = is_in
        is_in = is_expert & (rank_E < 0)  # nobody, in the type of what follows
        rank = 0
        while rank < ranks:
            is_here = rank_E == rank
            best = tl.sum((is_best & is_here).to(tl.int32), axis=0)
            left = tl.maximum(per_rank - best, 0)
            is_in = is_in | _most_voted(is_candidate & is_here, order, left, low_bits)
            beyond = tl.maximum(beyond, best - per_rank)
            rank += 1
    if HAS_TOTAL:
        best = tl.sum(is_best.to(tl.int32), axis=0)
        is_in = _most_voted(is_in, order, tl.maximum(budget - best, 0), low_bits)
        beyond = tl.maximum(beyond, best - budget)
    return is_best | is_in, beyond > 0


@triton.jit(do_not_specialize=["slots", "full", "guaranteed"])
def route_wake(
    logits_ptr, bias_ptr, allowed_ptr, padding_ptr, marks_ptr,
    slots, full, guaranteed, threshold, top_p, epsilon,
    E: tl.constexpr, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, GROUPS: tl.constexpr,
    PADDED_E: tl.constexpr, USED: tl.constexpr, BY_BEST: tl.constexpr, SLOTS: tl.constexpr,
    SCORING: tl.constexpr, NORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALLOWED: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_THRESHOLD: tl.constexpr,
    HAS_TOP_P: tl.constexpr, KEEP_WEIGHTS: tl.constexpr,
    HAS_GUARANTEED: tl.constexpr, HAS_BUDGET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """First of two launches: each token marks the experts it wants.

    `marks`: 1 for an expert guaranteed to some token; with a budget, the votes for an expert.
    """
    LOOKS_AT_ALL: tl.constexpr = HAS_THRESHOLD or HAS_TOP_P
    if PDL:
        gdc_launch_dependents()
    k = tl.arange(0, SLOTS)
    token = tl.program_id(0)
    keys, e, _is_expert, top, total, _is_number = own_keys(
        logits_ptr, bias_ptr, allowed_ptr, padding_ptr, token,
        E, SIZE, PADDED_SIZE, GROUPS, PADDED_E, USED, BY_BEST, SCORING,
        HAS_BIAS, HAS_ALLOWED, HAS_PADDING,
    )  # fmt: skip
    most = slots if LOOKS_AT_ALL or HAS_BUDGET else guaranteed
    ids_L, gates_L, kept, _whole = own_slots(
        logits_ptr, token, keys, e, top, total, threshold, top_p, epsilon, slots, full, most,
        E, SLOTS, SCORING, NORMALISE, HAS_BIAS, HAS_THRESHOLD, HAS_TOP_P, KEEP_WEIGHTS,
    )  # fmt: skip
    is_kept = k < kept
    if HAS_BUDGET:
        whole = whole_of(gates_L, is_kept, epsilon, SCORING, NORMALISE)
        shares_L = shares_of(gates_L, is_kept, whole, SCORING)
        votes_L = (shares_L * VOTE_UNIT).to(tl.int64) + 1  # a slot counts, however small its gate
        votes_L += (k == 0).to(tl.int64) << BEST_BIT
        tl.atomic_add(marks_ptr + ids_L, votes_L, mask=is_kept, sem="relaxed")
    if HAS_GUARANTEED:
        mark = tl.zeros_like(ids_L).to(marks_ptr.dtype.element_ty) + 1
        if HAS_BUDGET:
            mark = mark << GUARANTEED_BIT
        tl.atomic_or(marks_ptr + ids_L, mark, mask=is_kept & (k < guaranteed), sem="relaxed")


@triton.jit(
    do_not_specialize=[
        "tokens", "most_blocks", "slots", "full", "budget", "per_rank", "ranks", "low_bits",
    ]
)  # fmt: skip
def route_fill(
    logits_ptr, bias_ptr, allowed_ptr, padding_ptr,
    ids_ptr, weights_ptr, counts_ptr, rows_ptr, blocks_ptr, used_ptr,
    marks_ptr, over_ptr, rank_ptr,
    tokens, most_blocks, slots, full, threshold, top_p, epsilon, scaling,
    budget, per_rank, ranks, low_bits,
    E: tl.constexpr, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, GROUPS: tl.constexpr,
    PADDED_E: tl.constexpr, USED: tl.constexpr, BY_BEST: tl.constexpr, SLOTS: tl.constexpr,
    SCORING: tl.constexpr, NORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALLOWED: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_THRESHOLD: tl.constexpr,
    HAS_TOP_P: tl.constexpr, KEEP_WEIGHTS: tl.constexpr,
    REPEAT: tl.constexpr, SKIPPED: tl.constexpr, HAS_WORK: tl.constexpr,
    BEST: tl.constexpr, HAS_GUARANTEED: tl.constexpr, HAS_TOTAL: tl.constexpr,
    HAS_PER_RANK: tl.constexpr, ROWS: tl.constexpr, POWER_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Second of two launches: each token's slots from its own awake experts, then from the others.

    Each program finds out for itself who is awake, and its own experts again: both take less than
    to wait for one that writes them down. The last makes the marks zero again. `BEST` is the bit
    of a mark where tokens' best begin.
    """
    LOOKS_AT_ALL: tl.constexpr = HAS_THRESHOLD or HAS_TOP_P
    token = tl.program_id(0)
    keys, e, is_expert, top, total, is_number = own_keys(
        logits_ptr, bias_ptr, allowed_ptr, padding_ptr, token,
        E, SIZE, PADDED_SIZE, GROUPS, PADDED_E, USED, BY_BEST, SCORING,
        HAS_BIAS, HAS_ALLOWED, HAS_PADDING,
    )  # fmt: skip
    k = tl.arange(0, SLOTS)
    wanted, whole = tl.minimum(tl.sum((keys > ASLEEP).to(tl.int32), axis=0), slots), 1.0
    if LOOKS_AT_ALL or KEEP_WEIGHTS:
        most = tl.maximum(slots, full)
        ids_L, _gates_L, wanted, whole = own_slots(
            logits_ptr, token, keys, e, top, total, threshold, top_p, epsilon, slots, full, most,
            E, SLOTS, SCORING, NORMALISE, HAS_BIAS, HAS_THRESHOLD, HAS_TOP_P, KEEP_WEIGHTS,
        )  # fmt: skip
    if HAS_THRESHOLD and HAS_BIAS:  # else what it keeps are its best anyway
        slot = 0
        while slot < wanted:
            own = tl.sum(tl.where(k == slot, ids_L, 0), axis=0)
            keys = tl.where(e == own, FIRST - slot, keys)
            slot += 1
    if PDL:
        gdc_wait()
    marks = tl.load(marks_ptr + e, mask=is_expert, other=0)
    if HAS_TOTAL or HAS_PER_RANK:
        is_awake, is_over = _afford(
            marks, is_expert, e, rank_ptr, budget, per_rank, ranks, low_bits,
            E, BEST, HAS_GUARANTEED, HAS_TOTAL, HAS_PER_RANK,
        )  # fmt: skip
        tl.store(over_ptr, is_over.to(tl.int8), mask=token == 0)
    else:
        is_awake = marks > 0
    ids_L, found = best_slots(tl.where(is_awake, keys, ASLEEP), e, wanted, SLOTS)
    gates_L = gates_of(logits_ptr, token, ids_L, k < found, top, total, E, SCORING)
    filler = _filler(
        ids_L, logits_ptr, bias_ptr, allowed_ptr, padding_ptr, token,
        E, SIZE, PADDED_SIZE, GROUPS, PADDED_E, USED, BY_BEST, SLOTS, SCORING,
        HAS_BIAS, HAS_ALLOWED, HAS_PADDING, REPEAT, SKIPPED,
    )  # fmt: skip
    answers = _write(
        ids_L, gates_L, found, whole, is_number, filler, token, tokens, scaling, epsilon, slots,
        ids_ptr, weights_ptr, counts_ptr, rows_ptr, padding_ptr,
        E, SLOTS, SCORING, NORMALISE, HAS_PADDING, KEEP_WEIGHTS, HAS_WORK,
    )  # fmt: skip
    if is_last_answered(counts_ptr + E * COUNTER_STRIDE, tokens, answers):
        tl.store(marks_ptr + e, tl.zeros_like(marks), mask=is_expert)
        if HAS_WORK:
            _finish(counts_ptr, blocks_ptr, used_ptr, tokens, most_blocks, E, ROWS, POWER_E)
