"""What one token wants of its experts: scores, group limits, its best, and what it keeps of them.

Letters: K slots looked at (a token's, or the model's own top-k if that is more), E experts padded
to a power of two (where groups are limited: each group padded, and E those of one), G groups.

A program is one token and one warp, so that no sum or maximum leaves the warp.
"""

# mypy: ignore-errors
# Triton's language is not Python's: names are constexprs, tensors or pointers as they are used.

from __future__ import annotations

import triton
import triton.language as tl

from leanmoe.kernels import rule_words

(
    SLOTS_AT, OWN_AT, MARKS_AT, MUST_AT, FULL_AT, MASK_AT, BUDGET_AT, PER_RANK_AT,
    THRESHOLD_AT, TOP_P_AT, RENORMALISE_AT,
) = (tl.constexpr(int(word)) for word in rule_words.Word)  # fmt: skip
WORDS = tl.constexpr(rule_words.WORDS)
SOFTMAX, SIGMOID, SOFTMAX_AFTER, SQRT_SOFTPLUS = (tl.constexpr(i) for i in range(4))
KEPT_SLOTS, WHOLE_TOP_K, BOTH = (tl.constexpr(i) for i in range(3))
"""What `WHOLE`, of which a slot's weight is a share, is the sum of."""
INACTIVE = tl.constexpr(-(1 << 31))
"""A key below that of any expert that can be used."""
FIRST = tl.constexpr((1 << 31) - 1)
"""A key above that of any expert."""
NOBODY = tl.constexpr(1 << 30)
TINY = tl.constexpr(1.1754943508222875e-38)
NEVER = tl.constexpr(float("-inf"))


@triton.jit
def rule_row(words_ptr, band_ptr, rule_rows_ptr, allowed_ptr, token, rows, E: tl.constexpr):
    """The fields of a token's rule row, see `rule_words`; a number that is no row means row 0."""
    number = tl.load(rule_rows_ptr + token)
    row = tl.where((number >= 0) & (number < rows), number, 0).to(tl.int32)
    row_ptr = words_ptr + (tl.load(band_ptr) * rows + row) * WORDS
    slots, full = tl.load(row_ptr + SLOTS_AT), tl.load(row_ptr + FULL_AT)
    own, marks = tl.load(row_ptr + OWN_AT), tl.load(row_ptr + MARKS_AT)
    must, allowed_ptr = tl.load(row_ptr + MUST_AT), allowed_ptr + tl.load(row_ptr + MASK_AT) * E
    budget, per_rank = tl.load(row_ptr + BUDGET_AT), tl.load(row_ptr + PER_RANK_AT)
    threshold = tl.load(row_ptr + THRESHOLD_AT).to(tl.float32, bitcast=True)
    top_p = tl.load(row_ptr + TOP_P_AT).to(tl.float32, bitcast=True)
    renormalise = tl.load(row_ptr + RENORMALISE_AT).to(tl.float32, bitcast=True)
    return (
        slots, full, own, marks, must, allowed_ptr, budget, per_rank, threshold, top_p, renormalise
    )  # fmt: skip


@triton.jit
def expert_of(SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, GROUPS: tl.constexpr,
              PADDED_E: tl.constexpr):  # fmt: skip
    """The expert at each place, and which places hold one."""
    i = tl.arange(0, PADDED_E)
    if SIZE == PADDED_SIZE:  # then it is plain that they lie one after the other
        e, is_expert = i, i < SIZE * GROUPS
    else:
        inside = i % PADDED_SIZE
        e = (i // PADDED_SIZE) * SIZE + inside
        is_expert = (inside < SIZE) & (i // PADDED_SIZE < GROUPS)
    return e, is_expert


@triton.jit
def _gates(logits, top, total, SCORING: tl.constexpr):
    """What experts weigh; `top` and `total` are those of a softmax over all of them."""
    if SCORING == SOFTMAX_AFTER:
        gates = logits
    elif SCORING == SIGMOID:
        gates = tl.sigmoid(logits)
    elif SCORING == SQRT_SOFTPLUS:
        # ln(1 + e^x) as max(x, 0) + ln(1 + e^-|x|), which cannot overflow. Where e^-|x| is small
        # its sum with 1 has lost digits, and three terms of the logarithm's series are exact.
        small = tl.exp(-tl.abs(logits))
        series = small * (1.0 - small * (0.5 - small / 3.0))
        log = tl.where(small < 0.01, series, tl.log(1.0 + small))
        gates = tl.sqrt(tl.maximum(logits, 0.0) + log)
    else:
        gates = tl.exp(logits - top) / total
    return gates


@triton.jit
def _limit_groups(
    ranking, GROUPS: tl.constexpr, PADDED_G: tl.constexpr, PADDED_SIZE: tl.constexpr,
    USED: tl.constexpr, BY_BEST: tl.constexpr,
):  # fmt: skip
    """Rules out the experts of all but the token's best groups; equal groups: the lower first."""
    ranking_GE = tl.reshape(ranking, (PADDED_G, PADDED_SIZE))
    s, g = tl.arange(0, PADDED_SIZE), tl.arange(0, PADDED_G)
    value_G = tl.max(ranking_GE, axis=1)
    if not BY_BEST:
        place_G = tl.argmax(ranking_GE, axis=1)
        second_G = tl.max(tl.where(s[None, :] == place_G[:, None], NEVER, ranking_GE), axis=1)
        value_G += tl.where(second_G == NEVER, 0.0, second_G)
    value_G = tl.where(g < GROUPS, value_G, NEVER)
    other_GG = tl.broadcast_to(tl.expand_dims(value_G, 0), (PADDED_G, PADDED_G))
    own_GG = tl.broadcast_to(tl.expand_dims(value_G, 1), (PADDED_G, PADDED_G))
    before_GG = (other_GG > own_GG) | ((other_GG == own_GG) & (g[None, :] < g[:, None]))
    is_used_G = tl.sum(before_GG.to(tl.int32), axis=1) < USED
    kept_GE = tl.where(is_used_G[:, None], ranking_GE, NEVER)
    return tl.reshape(kept_GE, (PADDED_G * PADDED_SIZE,))


@triton.jit
def _keys(ranking):
    """Whole numbers that order experts as the ranking does: a warp finds their maximum fast."""
    bits = (ranking + 0.0).to(tl.int32, bitcast=True)  # + 0.0: minus zero equals zero
    return tl.where(ranking > NEVER, bits ^ ((bits >> 31) & 0x7FFFFFFF), INACTIVE)


@triton.jit
def best_slots(keys, e, most, SLOTS: tl.constexpr):
    """The `most` experts of highest key, equal ones by lower id.

    Returns ids, how many there are, and the keys with these experts `INACTIVE`.
    """
    ids_K, filled = tl.zeros((SLOTS,), dtype=tl.int32), tl.full((), 0, dtype=tl.int32)
    return more_slots(keys, e, ids_K, tl.arange(0, SLOTS), filled, most)


@triton.jit
def more_slots(keys, e, ids_K, place_K, filled, most):
    """As `best_slots`, for slots that have some places `filled`: 0 and up, in any order."""
    best = tl.max(keys, axis=0)
    while (filled < most) & (best > INACTIVE):
        expert = tl.min(tl.where(keys == best, e, NOBODY), axis=0)
        ids_K = tl.where(place_K == filled, expert, ids_K)
        keys = tl.where(e == expert, INACTIVE, keys)
        best = tl.max(keys, axis=0)
        filled += 1
    return ids_K, filled, keys


@triton.jit
def gates_of(
    logits_ptr, token, ids_K, is_filled, top, total, E: tl.constexpr, SCORING: tl.constexpr
):
    """Gates of some of a token's experts, as `own_slots` computed them to rank."""
    logits_K = tl.load(logits_ptr + token * E + ids_K, mask=is_filled, other=0.0).to(tl.float32)
    return tl.where(is_filled, _gates(logits_K, top, total, SCORING), 0.0)


@triton.jit
def _kept(
    gates_K, is_kept, threshold, top_p,
    SCORING: tl.constexpr, HAS_THRESHOLD: tl.constexpr, HAS_TOP_P: tl.constexpr,
):  # fmt: skip
    """Which of a token's slots threshold and top_p keep."""
    best = tl.max(tl.where(is_kept, gates_K, NEVER), axis=0)
    mass_K = tl.where(is_kept, gates_K, 0.0)
    if SCORING == SOFTMAX_AFTER:
        mass_K = tl.where(is_kept, tl.exp(gates_K - best), 0.0)
        best = 1.0
    total = tl.sum(mass_K, axis=0)
    if HAS_THRESHOLD:
        is_kept = is_kept & (mass_K >= threshold * best)
    if HAS_TOP_P:
        left_K = tl.where(is_kept, mass_K, 0.0)
        earlier_K = tl.cumsum(is_kept.to(tl.int32), axis=0) - is_kept.to(tl.int32)
        # Not the rounding of a running sum but nothing at all is before the first.
        before_K = tl.where(earlier_K == 0, 0.0, tl.cumsum(left_K, axis=0) - left_K)
        is_kept = is_kept & ((before_K < top_p * total) | (before_K == 0.0))
    return is_kept


@triton.jit
def _kept_first(ids_K, gates_K, is_kept, SLOTS: tl.constexpr):
    """The kept slots before all others, in their order."""
    l = tl.arange(0, SLOTS)  # noqa: E741
    to_K = tl.cumsum(is_kept.to(tl.int32), axis=0) - 1
    moves_KK = is_kept[:, None] & (to_K[:, None] == l[None, :])
    ids_K = tl.sum(tl.where(moves_KK, ids_K[:, None], 0), axis=0)
    gates_K = tl.sum(tl.where(moves_KK, gates_K[:, None], 0.0), axis=0)
    return ids_K, gates_K


@triton.jit
def whole_of(gates_K, is_counted, epsilon, SCORING: tl.constexpr, NORMALISE: tl.constexpr):
    """What the shares of these slots are taken of: their sum, or that of their exponentials."""
    if SCORING == SOFTMAX_AFTER:
        best = tl.max(tl.where(is_counted, gates_K, NEVER), axis=0)
        best = tl.where(best > NEVER, best, 0.0)
        whole = best + tl.log(tl.sum(tl.where(is_counted, tl.exp(gates_K - best), 0.0), axis=0))
    elif NORMALISE:
        whole = tl.maximum(tl.sum(tl.where(is_counted, gates_K, 0.0), axis=0) + epsilon, TINY)
    else:
        whole = 1.0
    return whole


@triton.jit
def shares_of(gates_K, is_kept, whole, SCORING: tl.constexpr):
    """What each kept slot weighs before scaling."""
    if SCORING == SOFTMAX_AFTER:  # noqa: SIM108, constexpr: one branch is compiled
        shares_K = tl.exp(gates_K - whole)
    else:
        shares_K = gates_K / whole
    return tl.where(is_kept, shares_K, 0.0)


@triton.jit
def weights_of(
    gates_K, is_kept, full, epsilon, renormalise, scaling,
    SCORING: tl.constexpr, NORMALISE: tl.constexpr, WHOLE: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """What each kept slot weighs; `full` is what shares are taken of where that is the top-k's."""
    whole = full
    if WHOLE != WHOLE_TOP_K:
        whole = whole_of(gates_K, is_kept, epsilon, SCORING, NORMALISE)
    kept_whole = whole
    if WHOLE == BOTH:
        if SCORING == SOFTMAX_AFTER:  # both are logarithms
            whole = renormalise * whole + (1.0 - renormalise) * full
        elif NORMALISE:
            whole = tl.exp(renormalise * tl.log(whole) + (1.0 - renormalise) * tl.log(full))
        if TABLE:  # of its rows some have no whole top-k
            whole = tl.where(renormalise < 1.0, whole, kept_whole)
    return shares_of(gates_K, is_kept, whole, SCORING) * scaling


@triton.jit
def own_keys(
    # pointers
    logits_ptr, bias_ptr, allowed_ptr, padding_ptr,
    # rows and places
    token,
    # compile-time
    E: tl.constexpr, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, GROUPS: tl.constexpr,
    PADDED_E: tl.constexpr, USED: tl.constexpr, BY_BEST: tl.constexpr, SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ALLOWED: tl.constexpr, HAS_PADDING: tl.constexpr,
):  # fmt: skip
    """Keys of all of a token's experts, `INACTIVE` for those it may not use.

    Returns also top and total, which give any expert's gate, and whether the gates are numbers.
    """
    e, is_expert = expert_of(SIZE, PADDED_SIZE, GROUPS, PADDED_E)
    logits = tl.load(logits_ptr + token * E + e, mask=is_expert, other=NEVER).to(tl.float32)
    usable = is_expert
    if HAS_ALLOWED:
        usable = usable & (tl.load(allowed_ptr + e, mask=is_expert, other=0) != 0)
    top, total = 0.0, 1.0
    if SCORING == SOFTMAX:
        # A pruned model's softmax knows nothing of the experts that are gone.
        logits = tl.where(usable, logits, NEVER)
        top = tl.max(logits, axis=0)
        total = tl.sum(tl.exp(logits - top), axis=0)
    ranking = _gates(logits, top, total, SCORING)
    is_odd = is_expert & ~(tl.abs(ranking) < float("inf")) & (logits != NEVER)
    is_number = (tl.sum(is_odd.to(tl.int32), axis=0) == 0) & (total == total)
    if HAS_BIAS:
        ranking += tl.load(bias_ptr + e, mask=is_expert, other=0.0)
    ranking = tl.where(usable, ranking, NEVER)
    if USED < GROUPS:
        ranking = _limit_groups(
            ranking, GROUPS, PADDED_E // PADDED_SIZE, PADDED_SIZE, USED, BY_BEST
        )
    is_real = is_number
    if HAS_PADDING:
        is_real = is_real & (tl.load(padding_ptr + token) == 0)
    return tl.where(is_real, _keys(ranking), INACTIVE), e, is_expert, top, total, is_number


@triton.jit
def own_slots(
    # pointers
    logits_ptr,
    # rows and places
    token, keys, e, top, total,
    # sizes and numbers
    threshold, top_p, epsilon, slots, full, most,
    # compile-time
    E: tl.constexpr, SLOTS: tl.constexpr, SCORING: tl.constexpr, NORMALISE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_THRESHOLD: tl.constexpr, HAS_TOP_P: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """A token's own slots under all fields of a rule but those that look at other tokens.

    Returns ids and gates of the best `most`, those it keeps first; how many it keeps; and what
    shares are taken of where that is the model's own top-k, `full` of them.
    """
    k = tl.arange(0, SLOTS)
    ids_K, filled, _others = best_slots(keys, e, most, SLOTS)
    gates_K = gates_of(logits_ptr, token, ids_K, k < filled, top, total, E, SCORING)
    whole = 1.0
    if WHOLE != KEPT_SLOTS:
        whole = whole_of(gates_K, k < tl.minimum(filled, full), epsilon, SCORING, NORMALISE)
    is_kept = k < tl.minimum(filled, slots)
    if HAS_THRESHOLD or HAS_TOP_P:
        is_kept = _kept(gates_K, is_kept, threshold, top_p, SCORING, HAS_THRESHOLD, HAS_TOP_P)
        if HAS_THRESHOLD and HAS_BIAS:  # a slot in the middle may go
            ids_K, gates_K = _kept_first(ids_K, gates_K, is_kept, SLOTS)
    return ids_K, gates_K, tl.sum(is_kept.to(tl.int32), axis=0), whole
