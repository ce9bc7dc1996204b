"""Router logits to ids, weights and the expert blocks: one launch, two where tokens share experts.

Letters: T tokens, K slots of a token that are looked at, E experts.

Where tokens share experts, the first launch marks whom they want and the second chooses among
those that are active by these marks. Whatever is counted is zero again at the end.
"""

# mypy: ignore-errors
# Triton's language is not Python's: names are constexprs, tensors or pointers as they are used.

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from leanmoe.kernels.triton.expert_blocks_program import is_last_answered, write_blocks
from leanmoe.kernels.triton.router_budget_program import GUARANTEED_BIT, afford
from leanmoe.kernels.triton.router_token_program import (
    FIRST,
    INACTIVE,
    best_slots,
    gates_of,
    more_slots,
    own_keys,
    own_slots,
    rule_row,
    shares_of,
    weights_of,
    whole_of,
)

COUNTER_STRIDE = tl.constexpr(8)
"""Counters of rows lie so far apart, 32 bytes: atomics on neighbours wait for each other."""

VOTE_UNIT = tl.constexpr(4294967296.0)
"""Votes are added as whole numbers: the order of the tokens cannot change a sum."""
BEST_BIT = tl.constexpr(47)
"""Of an expert's word. Below: the votes of 2^14 tokens; from here to `GUARANTEED_BIT`: how many
have it as their best. One word for all of it, since every program reads every expert's."""
BEST_BIT_OF_ALL = tl.constexpr(61)
"""Where ranks told each other, whether any token has it as its best; below, votes of all ranks."""


@triton.jit
def _write(
    # rows and places
    ids_K, gates_K, place_K, kept, whole, is_number, filler, token,
    # sizes and numbers
    tokens, scaling, epsilon, renormalise, slots, width,
    # pointers
    ids_ptr, weights_ptr, counts_ptr, rows_ptr, padding_ptr,
    # compile-time
    E: tl.constexpr, SCORING: tl.constexpr, NORMALISE: tl.constexpr, HAS_PADDING: tl.constexpr,
    WHOLE: tl.constexpr, HAS_BLOCKS: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """A token's ids and weights, kept slots first, and its rows in the expert blocks.

    `place_K` is where a slot is written, `filler` the id of a skipped one. Returns what the
    experts' counters answered; without blocks the ids, known no earlier than their choice.
    """
    is_kept = place_K < kept
    weights_K = weights_of(
        gates_K, is_kept, whole, epsilon, renormalise, scaling, SCORING, NORMALISE, WHOLE, TABLE
    )
    is_nan = ~is_number
    if HAS_PADDING:
        is_nan = is_nan & (tl.load(padding_ptr + token) == 0)
    # NaN in, NaN out: whoever looks at the result must see it.
    if TABLE:
        weights_K = tl.where(is_nan & (place_K < slots), float("nan"), weights_K)
    else:
        weights_K = tl.where(is_nan, float("nan"), weights_K)
    # No scalar is spread as a mask: Triton 3.9's interpreter makes integers of it.
    is_kept = place_K < tl.where(is_nan, slots, kept)
    ids_K = tl.where(is_nan, place_K % E, ids_K)
    at, is_slot = token * width + place_K, place_K < width
    written_K = tl.where(is_kept, ids_K, filler).to(ids_ptr.dtype.element_ty)
    tl.store(ids_ptr + at, written_K, mask=is_slot)
    tl.store(weights_ptr + at, weights_K, mask=is_slot)
    is_row = is_kept & is_slot
    if HAS_BLOCKS:
        count_at = counts_ptr + ids_K * COUNTER_STRIDE
        answer_K = tl.atomic_add(count_at, 1, mask=is_row, sem="relaxed")
        tl.store(rows_ptr + ids_K * tokens + answer_K, at.to(tl.int32), mask=is_row)
    else:
        answer_K = ids_K
    return tl.where(is_row, answer_K, 0)


@triton.jit
def _filler(
    # rows and places
    ids_K, place_K,
    # pointers
    logits_ptr, bias_ptr, allowed_ptr, padding_ptr,
    # rows and places
    token,
    # compile-time
    E: tl.constexpr, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, GROUPS: tl.constexpr,
    PADDED_E: tl.constexpr, USED: tl.constexpr, BY_BEST: tl.constexpr, SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ALLOWED: tl.constexpr, HAS_PADDING: tl.constexpr,
    REPEAT: tl.constexpr, SKIPPED: tl.constexpr,
    # the rule table
    words_ptr, band_ptr, rule_rows_ptr, rows, TABLE: tl.constexpr,
):  # fmt: skip
    """The id of a token's skipped slots: `SKIPPED`, or with `REPEAT` that of an expert that is
    active anyway: the token's best; for padding, that of the first token.
    """
    filler = SKIPPED
    if REPEAT:
        filler = tl.sum(tl.where(place_K == 0, ids_K, 0), axis=0)
        if HAS_PADDING:  # noqa: SIM102, constexpr: there is a pointer only with it
            if tl.load(padding_ptr + token) != 0:
                if TABLE:
                    slots, _f, _o, _m, _u, allowed_ptr, _b, _r, _t, _p, _n = rule_row(
                        words_ptr, band_ptr, rule_rows_ptr, allowed_ptr, 0, rows, E
                    )
                keys, e, _is_expert, _top, _total, _is_number = own_keys(
                    logits_ptr, bias_ptr, allowed_ptr, padding_ptr, 0,
                    E, SIZE, PADDED_SIZE, GROUPS, PADDED_E, USED, BY_BEST, SCORING,
                    HAS_BIAS, HAS_ALLOWED, False,
                )  # fmt: skip
                filler = tl.min(tl.where(keys == tl.max(keys, axis=0), e, E - 1), axis=0)
                if TABLE:  # a first token without slots has no best
                    filler = tl.where(slots > 0, filler, 0)
    return filler


@triton.jit
def _finish(
    counts_ptr, blocks_ptr, used_ptr, tokens, most_blocks,
    E: tl.constexpr, BLOCK_ROWS: tl.constexpr, POWER_E: tl.constexpr,
):  # fmt: skip
    """The last program's: blocks from counts, and the counts zero again."""
    e = tl.arange(0, POWER_E)[None, :]
    count_at = counts_ptr + e * COUNTER_STRIDE
    counts_1E = tl.load(count_at, mask=e < E, other=0, cache_modifier=".cg")
    tl.store(count_at, 0, mask=e < E)
    write_blocks(counts_1E, e * tokens, blocks_ptr, used_ptr, most_blocks, BLOCK_ROWS, POWER_E)


@triton.jit(do_not_specialize=["tokens", "most_blocks", "slots", "full", "rows"])
def route_alone(
    # pointers
    logits_ptr, bias_ptr, allowed_ptr, padding_ptr, ids_ptr, weights_ptr, counts_ptr, rows_ptr,
    blocks_ptr, used_ptr,
    # sizes and numbers
    tokens, most_blocks, slots, full, threshold, top_p, epsilon, scaling, renormalise,
    # the rule table, None without one
    words_ptr, band_ptr, rule_rows_ptr, rows,
    # compile-time
    E: tl.constexpr, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, GROUPS: tl.constexpr,
    PADDED_E: tl.constexpr, USED: tl.constexpr, BY_BEST: tl.constexpr, SLOTS: tl.constexpr,
    SCORING: tl.constexpr, NORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALLOWED: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_THRESHOLD: tl.constexpr,
    HAS_TOP_P: tl.constexpr, WHOLE: tl.constexpr, REPEAT: tl.constexpr,
    SKIPPED: tl.constexpr, HAS_BLOCKS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    POWER_E: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Rules under which a token's experts are its own business: everything, in one launch."""
    token = tl.program_id(0)
    width, masks_ptr = slots, allowed_ptr
    if TABLE:
        slots, full, _o, _m, _u, allowed_ptr, _b, _r, threshold, top_p, renormalise = rule_row(
            words_ptr, band_ptr, rule_rows_ptr, masks_ptr, token, rows, E
        )
    keys, e, _is_expert, top, total, is_number = own_keys(
        logits_ptr, bias_ptr, allowed_ptr, padding_ptr, token,
        E, SIZE, PADDED_SIZE, GROUPS, PADDED_E, USED, BY_BEST, SCORING,
        HAS_BIAS, HAS_ALLOWED, HAS_PADDING,
    )  # fmt: skip
    most = tl.maximum(slots, full)
    ids_K, gates_K, kept, whole = own_slots(
        logits_ptr, token, keys, e, top, total, threshold, top_p, epsilon, slots, full, most,
        E, SLOTS, SCORING, NORMALISE, HAS_BIAS, HAS_THRESHOLD, HAS_TOP_P, WHOLE,
    )  # fmt: skip
    place_K = tl.arange(0, SLOTS)
    filler = _filler(
        ids_K, place_K, logits_ptr, bias_ptr, masks_ptr, padding_ptr, token,
        E, SIZE, PADDED_SIZE, GROUPS, PADDED_E, USED, BY_BEST, SCORING,
        HAS_BIAS, HAS_ALLOWED, HAS_PADDING, REPEAT, SKIPPED,
        words_ptr, band_ptr, rule_rows_ptr, rows, TABLE,
    )  # fmt: skip
    answers = _write(
        ids_K, gates_K, place_K, kept, whole, is_number, filler, token, tokens, scaling, epsilon,
        renormalise, slots, width, ids_ptr, weights_ptr, counts_ptr, rows_ptr, padding_ptr,
        E, SCORING, NORMALISE, HAS_PADDING, WHOLE, HAS_BLOCKS, TABLE,
    )  # fmt: skip
    if HAS_BLOCKS:  # noqa: SIM102, constexpr: nothing is counted without it
        if is_last_answered(counts_ptr + E * COUNTER_STRIDE, tokens, answers):
            _finish(counts_ptr, blocks_ptr, used_ptr, tokens, most_blocks, E, BLOCK_ROWS, POWER_E)


@triton.jit(do_not_specialize=["slots", "full", "guaranteed", "rows"])
def route_activate(
    # pointers
    logits_ptr, bias_ptr, allowed_ptr, padding_ptr, marks_ptr,
    # sizes and numbers
    slots, full, guaranteed, threshold, top_p, epsilon,
    # the rule table, None without one
    words_ptr, band_ptr, rule_rows_ptr, rows,
    # compile-time
    E: tl.constexpr, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, GROUPS: tl.constexpr,
    PADDED_E: tl.constexpr, USED: tl.constexpr, BY_BEST: tl.constexpr, SLOTS: tl.constexpr,
    SCORING: tl.constexpr, NORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALLOWED: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_THRESHOLD: tl.constexpr,
    HAS_TOP_P: tl.constexpr, WHOLE: tl.constexpr, HAS_GUARANTEED: tl.constexpr,
    HAS_BUDGET: tl.constexpr, USE_PDL: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """First of two launches: each token marks the experts it wants.

    `marks`: 1 for an expert guaranteed to some token; with a budget, the votes for an expert.
    """
    LOOKS_AT_ALL: tl.constexpr = HAS_THRESHOLD or HAS_TOP_P
    if USE_PDL:
        gdc_launch_dependents()
    k = tl.arange(0, SLOTS)
    token = tl.program_id(0)
    if TABLE:
        slots, full, _o, guaranteed, must, allowed_ptr, _b, _r, threshold, top_p, _n = rule_row(
            words_ptr, band_ptr, rule_rows_ptr, allowed_ptr, token, rows, E
        )
        slots = tl.where(guaranteed > 0, slots, 0)  # a token that marks nothing has no vote
    keys, e, _is_expert, top, total, _is_number = own_keys(
        logits_ptr, bias_ptr, allowed_ptr, padding_ptr, token,
        E, SIZE, PADDED_SIZE, GROUPS, PADDED_E, USED, BY_BEST, SCORING,
        HAS_BIAS, HAS_ALLOWED, HAS_PADDING,
    )  # fmt: skip
    most = slots if LOOKS_AT_ALL or HAS_BUDGET else guaranteed
    ids_K, gates_K, kept, _whole = own_slots(
        logits_ptr, token, keys, e, top, total, threshold, top_p, epsilon, slots, full, most,
        E, SLOTS, SCORING, NORMALISE, HAS_BIAS, HAS_THRESHOLD, HAS_TOP_P, WHOLE,
    )  # fmt: skip
    is_kept = k < kept
    if HAS_BUDGET:
        whole = whole_of(gates_K, is_kept, epsilon, SCORING, NORMALISE)
        shares_K = shares_of(gates_K, is_kept, whole, SCORING)
        votes_K = (shares_K * VOTE_UNIT).to(tl.int64) + 1  # a slot counts, however small its gate
        if TABLE:
            votes_K += (k < must).to(tl.int64) << BEST_BIT
        else:
            votes_K += (k == 0).to(tl.int64) << BEST_BIT
        tl.atomic_add(marks_ptr + ids_K, votes_K, mask=is_kept, sem="relaxed")
    if HAS_GUARANTEED:
        mark = tl.zeros_like(ids_K).to(marks_ptr.dtype.element_ty) + 1
        if HAS_BUDGET:
            mark = mark << GUARANTEED_BIT
        tl.atomic_or(marks_ptr + ids_K, mark, mask=is_kept & (k < guaranteed), sem="relaxed")


@triton.jit(
    do_not_specialize=[
        "tokens", "most_blocks", "slots", "full", "guaranteed", "budget", "per_rank", "ranks",
        "low_bits", "rows",
    ]
)  # fmt: skip
def route_fill(
    # pointers
    logits_ptr, bias_ptr, allowed_ptr, padding_ptr, ids_ptr, weights_ptr, counts_ptr, rows_ptr,
    blocks_ptr, used_ptr, marks_ptr, over_ptr, rank_ptr,
    # sizes and numbers
    tokens, most_blocks, slots, full, threshold, top_p, epsilon, scaling, renormalise,
    guaranteed, budget, per_rank, ranks, low_bits,
    # the rule table, None without one
    words_ptr, band_ptr, rule_rows_ptr, rows,
    # compile-time
    E: tl.constexpr, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, GROUPS: tl.constexpr,
    PADDED_E: tl.constexpr, USED: tl.constexpr, BY_BEST: tl.constexpr, SLOTS: tl.constexpr,
    SCORING: tl.constexpr, NORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALLOWED: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_THRESHOLD: tl.constexpr,
    HAS_TOP_P: tl.constexpr, WHOLE: tl.constexpr, REPEAT: tl.constexpr,
    SKIPPED: tl.constexpr, HAS_BLOCKS: tl.constexpr, BEST: tl.constexpr,
    HAS_GUARANTEED: tl.constexpr, HAS_TOTAL: tl.constexpr, HAS_PER_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, POWER_E: tl.constexpr, USE_PDL: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Second of two launches: each token's slots from its own active experts, then from the others.

    Each program finds out for itself which are active, and its own experts again: both take less
    than to wait for one that writes them down, and the latter is done while the first launch runs.
    The last makes the marks zero again. `BEST` is the bit of a mark where tokens' best begin.
    """
    LOOKS_AT_ALL: tl.constexpr = HAS_THRESHOLD or HAS_TOP_P or WHOLE > 0
    HAS_BUDGET: tl.constexpr = HAS_TOTAL or HAS_PER_RANK
    token = tl.program_id(0)
    width, masks_ptr = slots, allowed_ptr
    if TABLE:  # here the slots it keeps whatever is active are those it is guaranteed
        (
            slots, full, guaranteed, _m, _u, allowed_ptr, budget, per_rank,
            threshold, top_p, renormalise,
        ) = rule_row(words_ptr, band_ptr, rule_rows_ptr, masks_ptr, token, rows, E)  # fmt: skip
    keys, e, is_expert, top, total, is_number = own_keys(
        logits_ptr, bias_ptr, allowed_ptr, padding_ptr, token,
        E, SIZE, PADDED_SIZE, GROUPS, PADDED_E, USED, BY_BEST, SCORING,
        HAS_BIAS, HAS_ALLOWED, HAS_PADDING,
    )  # fmt: skip
    k = tl.arange(0, SLOTS)
    whole = 1.0
    # A budget may drop any of its own; without one those it is guaranteed are all active.
    if LOOKS_AT_ALL:
        most = tl.maximum(slots, full)
        ids_K, _gates_K, wanted, whole = own_slots(
            logits_ptr, token, keys, e, top, total, threshold, top_p, epsilon, slots, full, most,
            E, SLOTS, SCORING, NORMALISE, HAS_BIAS, HAS_THRESHOLD, HAS_TOP_P, WHOLE,
        )  # fmt: skip
        own, slot = wanted if HAS_BUDGET else tl.minimum(guaranteed, wanted), 0
        # A threshold keeps by gate, a bias ranks otherwise: then what it keeps comes before others.
        last = wanted if HAS_THRESHOLD and HAS_BIAS else own
        while slot < last:
            own_id = tl.sum(tl.where(k == slot, ids_K, 0), axis=0)
            keys = tl.where(e == own_id, tl.where(slot < own, INACTIVE, FIRST - slot), keys)
            slot += 1
    elif HAS_BUDGET:
        ids_K, wanted, keys = best_slots(keys, e, slots, SLOTS)
        own = wanted
    else:
        wanted = tl.minimum(tl.sum((keys > INACTIVE).to(tl.int32), axis=0), slots)
        ids_K, own, keys = best_slots(keys, e, tl.minimum(guaranteed, wanted), SLOTS)
    if USE_PDL:
        gdc_wait()
    marks = tl.load(marks_ptr + e, mask=is_expert, other=0)
    place_K = k
    if HAS_BUDGET:
        is_active, is_over = afford(
            marks, is_expert, e, rank_ptr, budget, per_rank, ranks, low_bits,
            E, POWER_E, BEST, HAS_GUARANTEED, HAS_TOTAL, HAS_PER_RANK,
        )  # fmt: skip
        tl.store(over_ptr, is_over.to(tl.int8), mask=token == 0)
        at_K = ids_K // SIZE * PADDED_SIZE + ids_K % SIZE  # where its expert lies in e
        is_own_K = (k < own) & (tl.gather(is_active.to(tl.int32), at_K, axis=0) > 0)
        if TABLE:
            is_own_K = is_own_K | (k < tl.minimum(guaranteed, own))
        before_K = tl.cumsum(is_own_K.to(tl.int32), axis=0) - is_own_K.to(tl.int32)
        own = tl.sum(is_own_K.to(tl.int32), axis=0)
        place_K = tl.where(is_own_K, before_K, own + k - before_K)
    else:
        is_active = marks > 0
    others = tl.where(is_active, keys, INACTIVE)
    ids_K, filled, _others = more_slots(others, e, ids_K, place_K, own, wanted)
    gates_K = gates_of(logits_ptr, token, ids_K, place_K < filled, top, total, E, SCORING)
    filler = _filler(
        ids_K, place_K, logits_ptr, bias_ptr, masks_ptr, padding_ptr, token,
        E, SIZE, PADDED_SIZE, GROUPS, PADDED_E, USED, BY_BEST, SCORING,
        HAS_BIAS, HAS_ALLOWED, HAS_PADDING, REPEAT, SKIPPED,
        words_ptr, band_ptr, rule_rows_ptr, rows, TABLE,
    )  # fmt: skip
    answers = _write(
        ids_K, gates_K, place_K, filled, whole, is_number, filler, token, tokens, scaling, epsilon,
        renormalise, slots, width, ids_ptr, weights_ptr, counts_ptr, rows_ptr, padding_ptr,
        E, SCORING, NORMALISE, HAS_PADDING, WHOLE, HAS_BLOCKS, TABLE,
    )  # fmt: skip
    if is_last_answered(counts_ptr + E * COUNTER_STRIDE, tokens, answers):
        tl.store(marks_ptr + e, tl.zeros_like(marks), mask=is_expert)
        if HAS_BLOCKS:
            _finish(counts_ptr, blocks_ptr, used_ptr, tokens, most_blocks, E, BLOCK_ROWS, POWER_E)
