"""What a call of routing on the CPU is told, and where its scratch memory holds what.

Numbers and addresses arrive in one array of int64. Shapes: S steps, T tokens in a step, E experts,
K slots a token.
"""

# mypy: ignore-errors
# numba infers the types.

from __future__ import annotations

from numba import carray
from numba.extending import register_jitable

from leanmoe.kernels.cpu.gemm import padded
from leanmoe.kernels.cpu.llvm_microkernel import LANES, bytes_at, floats_at, ints_at, longs_at

(
    LOGITS, BIAS, PADDING, IDS, WEIGHTS, OVER, RULES, RULE_ROWS, SCRATCH,
    STEPS, TOKENS, EXPERTS, SLOTS, LISTED, SCORING, NORMALISE, GROUPS, GROUPS_USED, GROUP_MAX,
    ROWS, SHARES, BUDGET, THREADS, TEAM, THREAD_NUMBER, ENTRY, TASK,
    FIELDS,
) = range(28)  # fmt: skip
"""BIAS, PADDING and OVER are 0 where there is none; so is BUDGET. RULES has ROWS rules, RULE_ROWS
the number (int64) of each token's, 0 where all are under the first. SHARES is 1 where a token's
experts depend on others. LISTED is the most slots that any rule looks at."""

(
    ROW_SLOTS, ROW_OWN, ROW_MARKS, ROW_MUST, ROW_FULL, ROW_ALLOWED, ROW_NUMBERS, ROW_FIELDS,
) = range(8)  # fmt: skip
"""What a rule says, see `leanmoe.routing.RowRule`. ROW_FULL is the model's own top-k where weights
depend on all of it, else 0; ROW_ALLOWED is 0 where no expert is pruned."""

SOFTMAX, SIGMOID, SOFTMAX_AFTER, SQRT_SOFTPLUS = range(4)
"""What SCORING may be."""
THRESHOLD, TOP_P, EPSILON, SCALING, RENORMALISE, NUMBERS_HELD = range(6)
"""Places in ROW_NUMBERS; a threshold or top_p below zero is none."""


def scratch_bytes(tokens, experts, listed, threads, is_batch_aware):
    """What `SCRATCH` must hold: a row of scores a thread, or a token where tokens share."""
    rows = tokens if is_batch_aware else threads
    lines = 2 * rows * padded(experts, LANES) * 4 + 2 * tokens * listed * 4
    return lines + 2 * tokens * 4 + 10 * padded(experts, LANES) + 256


@register_jitable
def rule_of(field, token):
    """The rule that a token is under; a number that is no row's means row 0."""
    row = 0
    if field[RULE_ROWS] != 0:
        row = carray(longs_at(field[RULE_ROWS]), field[STEPS] * field[TOKENS])[token]
        row = row if 0 <= row < field[ROWS] else 0
    return carray(longs_at(field[RULES] + row * ROW_FIELDS * 8), ROW_FIELDS)


@register_jitable
def scores_at(field, row):
    """The gates and the ranking of one token, each padded to whole vectors."""
    width = padded(field[EXPERTS], LANES)
    at = field[SCRATCH] + 2 * row * width * 4
    return carray(floats_at(at), width), carray(floats_at(at + width * 4), width)


@register_jitable
def lists_at(field, rows):
    """Each token's own experts, their number and whole weight; a step's votes and active ones."""
    tokens, slots = field[STEPS] * field[TOKENS], field[LISTED]
    width = padded(field[EXPERTS], LANES)
    at = field[SCRATCH] + 2 * rows * width * 4
    own = carray(ints_at(at), tokens * slots)
    at += tokens * slots * 4
    own_gates = carray(floats_at(at), tokens * slots)
    at += tokens * slots * 4
    counts = carray(ints_at(at), tokens)
    at += tokens * 4
    wholes = carray(floats_at(at), tokens)
    at = (at + tokens * 4 + 63) // 64 * 64
    votes = carray(longs_at(at), width)
    active = carray(bytes_at(at + width * 8), width)
    return own, own_gates, counts, wholes, votes, active
