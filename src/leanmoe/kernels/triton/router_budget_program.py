"""Which experts of a step stay active within its budgets: every token's best, then the most voted.

Each program of the second launch finds it out for itself, from the words that the first one left.
"""

# mypy: ignore-errors
# Triton's language is not Python's: names are constexprs, tensors or pointers as they are used.

from __future__ import annotations

import triton
import triton.language as tl

GUARANTEED_BIT = tl.constexpr(62)
"""Of an expert's word: whether any token activates it."""


@triton.jit
def _least_of_best(keys, number):
    """A whole number that `number` of the keys reach, and how many do: more where keys are equal.

    Found bit by bit, the highest first, until it is so many: two bits a step took as long. Keys
    have 31 bits; negative ones are none.
    """
    least, reached = 0, tl.sum((keys >= 0).to(tl.int32), axis=0)
    highest = tl.maximum(tl.max(keys, axis=0), 1).to(tl.float32)  # its exponent: where to begin
    bit = 1 << tl.minimum((highest.to(tl.int32, bitcast=True) >> 23) - 127, 30)
    bit = tl.where(number > 0, bit, 0)
    while (bit > 0) & (reached > number):
        count = tl.sum((keys >= least + bit).to(tl.int32), axis=0)
        is_enough = count >= number
        reached = tl.where(is_enough, count, reached)
        least = tl.where(is_enough, least + bit, least)
        bit >>= 1
    return least, reached


@triton.jit
def _most_voted(upper, votes, e, number, low_bits, E: tl.constexpr, POWER_E: tl.constexpr):
    """The `number` experts of most votes, equal ones by lower id, or all where they are fewer.

    Those with `upper` at all: it is their votes without the `low_bits`, 30 bits, and -1 for others.
    What is left of the votes, and the id, is searched only among equals in these.
    """
    least, reached = _least_of_best(upper, number)
    is_in = upper >= least
    if (reached > number) & (number > 0):
        rest = votes.to(tl.int32) & ((1 << low_bits) - 1)
        lower = tl.where(upper == least, rest * POWER_E + (E - 1 - e), -1)
        is_in = upper > least
        missing = number - tl.sum(is_in.to(tl.int32), axis=0)
        least, _reached = _least_of_best(lower, missing)
        is_in = is_in | (lower >= least)
    return is_in & (number > 0)


@triton.jit
def afford(
    # rows and places
    marks, is_expert, e,
    # pointers
    rank_ptr,
    # sizes and numbers
    budget, per_rank, ranks, low_bits,
    # compile-time
    E: tl.constexpr, POWER_E: tl.constexpr, BEST: tl.constexpr, HAS_GUARANTEED: tl.constexpr,
    HAS_TOTAL: tl.constexpr, HAS_PER_RANK: tl.constexpr,
):  # fmt: skip
    """Every token's best stay active, and the most voted-for while the budgets last.

    Whole numbers in order: votes, then the lower id. A rank's budget comes first, one after the
    other, and that of all ranks among those that are left. Returns also whether the best alone
    are more than a budget.
    """
    one = tl.zeros_like(marks) + 1
    votes = marks & ((one << BEST) - 1)
    is_best = (marks & ((one << GUARANTEED_BIT) - (one << BEST))) != 0
    is_out = is_best | (votes == 0)
    if HAS_GUARANTEED:
        is_out = is_out | ((marks >> GUARANTEED_BIT) == 0)
    upper = tl.where(is_out, -1, (votes >> low_bits).to(tl.int32))
    beyond = 0
    if HAS_PER_RANK:
        rank_E = tl.load(rank_ptr + e, mask=is_expert, other=-1)
        is_in = is_expert & (rank_E < 0)  # nobody, in the type of what follows
        rank = 0
        while rank < ranks:
            is_here = rank_E == rank
            best = tl.sum((is_best & is_here).to(tl.int32), axis=0)
            left = tl.maximum(per_rank - best, 0)
            here = tl.where(is_here, upper, -1)
            is_in = is_in | _most_voted(here, votes, e, left, low_bits, E, POWER_E)
            beyond = tl.maximum(beyond, best - per_rank)
            rank += 1
        upper = tl.where(is_in, upper, -1)
    if HAS_TOTAL:
        best = tl.sum(is_best.to(tl.int32), axis=0)
        left = tl.maximum(budget - best, 0)
        is_in = _most_voted(upper, votes, e, left, low_bits, E, POWER_E)
        beyond = tl.maximum(beyond, best - budget)
    return is_best | is_in, beyond > 0
