"""One token's routing on the CPU: its scores, its own experts in order, what each weighs.

It looks at no other token. `leanmoe.routing` is the reference, and says what the fields of a rule
mean; see route_args.py for what `field` holds.
"""

# mypy: ignore-errors
# numba infers the types.

from __future__ import annotations

import numpy as np
from numba import carray, njit

from leanmoe.kernels.cpu import llvm_microkernel
from leanmoe.kernels.cpu import route_args as at
from leanmoe.kernels.cpu.gemm import padded
from leanmoe.kernels.cpu.llvm_microkernel import LANES, bytes_at, floats_at, longs_at
from leanmoe.kernels.cpu.numba_compile import COMPILE

NEVER = np.float32(-np.inf)
INFINITE = np.float32(np.inf)
TINY = np.float32(np.finfo(np.float32).tiny)


@njit(**COMPILE)
def _softmax(field, rule, gates):
    """The softmax of logits in their place; it knows nothing of the experts that are pruned.

    These are left out by passes of their own: asked for in each loop, they cost every model 7%.
    """
    experts = field[at.EXPERTS]
    allowed = carray(bytes_at(rule[at.ROW_ALLOWED]), experts)
    if rule[at.ROW_ALLOWED] != 0:
        for e in range(experts):
            gates[e] = gates[e] if allowed[e] != 0 else NEVER
    best = NEVER
    for e in range(experts):
        best = gates[e] if gates[e] > best else best
    for e in range(experts):
        gates[e] -= best
    for e in range(experts, gates.size):
        gates[e] = 0.0
    llvm_microkernel.exponential(gates.ctypes.data, gates.size // LANES)
    if rule[at.ROW_ALLOWED] != 0:
        for e in range(experts):
            gates[e] = gates[e] if allowed[e] != 0 else 0.0
    total = np.float32(0.0)
    for e in range(experts):
        total += gates[e]
    for e in range(experts):
        gates[e] /= total


@njit(**COMPILE)
def score(field, rule, token, gates, ranking):
    """Fills in a token's gates and ranking; whether they are numbers."""
    experts, width = field[at.EXPERTS], padded(field[at.EXPERTS], LANES)
    logits = carray(floats_at(field[at.LOGITS] + token * experts * 4), experts)
    if field[at.SCORING] == at.SOFTMAX_AFTER:
        for e in range(experts):
            gates[e] = logits[e]
    elif field[at.SCORING] == at.SIGMOID:
        for e in range(experts):
            gates[e] = logits[e]
        for e in range(experts, width):
            gates[e] = 0.0
        llvm_microkernel.sigmoid(gates.ctypes.data, width // LANES)
    elif field[at.SCORING] == at.SQRT_SOFTPLUS:
        for e in range(experts):
            gates[e] = -np.abs(logits[e])
        for e in range(experts, width):
            gates[e] = 0.0
        llvm_microkernel.exponential(gates.ctypes.data, width // LANES)
        for e in range(experts):  # ln(1 + e^x) of a large x would overflow
            above = logits[e] if logits[e] > 0 else np.float32(0.0)
            gates[e] = np.sqrt(above + np.log1p(gates[e]))
    else:
        for e in range(experts):
            gates[e] = logits[e]
        _softmax(field, rule, gates)
    not_numbers = 0
    for e in range(experts):
        not_numbers += not np.abs(gates[e]) < INFINITE
        ranking[e] = gates[e]
    if field[at.BIAS] != 0:
        bias = carray(floats_at(field[at.BIAS]), experts)
        for e in range(experts):
            ranking[e] += bias[e]
    if rule[at.ROW_ALLOWED] != 0:
        allowed = carray(bytes_at(rule[at.ROW_ALLOWED]), experts)
        for e in range(experts):
            if allowed[e] == 0:
                ranking[e] = NEVER
    return not_numbers == 0


@njit(**COMPILE)
def limit_groups(field, ranking):
    """Ranks the experts of all but the token's best groups last."""
    groups, size = field[at.GROUPS], field[at.EXPERTS] // field[at.GROUPS]
    value = np.empty(64, np.float32)
    for g in range(groups):
        first, second = NEVER, NEVER
        for e in range(g * size, (g + 1) * size):
            rank = ranking[e]
            if rank > first:
                second = first
                first = rank
            elif rank > second:
                second = rank
        if field[at.GROUP_MAX] == 1 or second == NEVER:
            value[g] = first
        else:
            value[g] = first + second
    for g in range(groups):
        better = 0
        for other in range(groups):
            if value[other] > value[g] or (value[other] == value[g] and other < g):
                better += 1
        if better >= field[at.GROUPS_USED]:
            for e in range(g * size, (g + 1) * size):
                ranking[e] = NEVER


@njit(**COMPILE)
def insert(ids, ranks, count, most, expert, rank):
    """Keeps the best `most` experts in order, the lower id first among equals; how many."""
    if count == most:
        if rank <= ranks[count - 1]:
            return count
    else:
        count += 1
    place = count - 1
    while place > 0 and ranks[place - 1] < rank:
        ranks[place], ids[place] = ranks[place - 1], ids[place - 1]
        place -= 1
    ranks[place], ids[place] = rank, expert
    return count


@njit(**COMPILE)
def keep(field, rule, ids, gates, count):
    """Drops what threshold and top_p drop, in place; how many are left."""
    numbers = carray(floats_at(rule[at.ROW_NUMBERS]), at.NUMBERS_HELD)
    threshold, top_p = numbers[at.THRESHOLD], numbers[at.TOP_P]
    if count == 0 or (threshold < 0 and top_p < 0):
        return count
    mass = np.empty(count, np.float32)
    best = gates[0]
    for k in range(count):
        best = gates[k] if gates[k] > best else best
    total = np.float32(0.0)
    for k in range(count):
        mass[k] = np.exp(gates[k] - best) if field[at.SCORING] == at.SOFTMAX_AFTER else gates[k]
        total += mass[k]
    best = np.float32(1.0) if field[at.SCORING] == at.SOFTMAX_AFTER else best
    kept, before = 0, np.float32(0.0)
    for k in range(count):
        if threshold >= 0 and mass[k] < threshold * best:
            continue
        if top_p >= 0 and before > 0 and before >= top_p * total:
            break
        before += mass[k]
        ids[kept], gates[kept] = ids[k], gates[k]
        kept += 1
    return kept


@njit(**COMPILE)
def whole_of(field, rule, gates, count):
    """What the shares of these slots are taken of: their sum, or that of their exponentials."""
    if field[at.SCORING] == at.SOFTMAX_AFTER:
        best, total = NEVER, np.float32(0.0)
        for k in range(count):
            best = gates[k] if gates[k] > best else best
        for k in range(count):
            total += np.exp(gates[k] - best)
        return best + np.log(total)
    if field[at.NORMALISE] == 0:
        return np.float32(1.0)
    total = np.float32(0.0)
    for k in range(count):
        total += gates[k]
    total += carray(floats_at(rule[at.ROW_NUMBERS]), at.NUMBERS_HELD)[at.EPSILON]
    return TINY if total < TINY else total


@njit(**COMPILE)
def between(field, rule, kept, full):
    """What the shares are taken of where both the kept slots and the whole top-k count."""
    a = carray(floats_at(rule[at.ROW_NUMBERS]), at.NUMBERS_HELD)[at.RENORMALISE]
    one = np.float32(1.0)
    if field[at.SCORING] == at.SOFTMAX_AFTER:  # both are logarithms
        return a * kept + (one - a) * full
    return kept**a * full ** (one - a)


@njit(**COMPILE)
def share(field, gates, kept, whole, shares):
    """What each kept slot weighs before scaling."""
    if field[at.SCORING] == at.SOFTMAX_AFTER:
        for k in range(kept):
            shares[k] = np.exp(gates[k] - whole)
    else:
        for k in range(kept):
            shares[k] = gates[k] / whole


@njit(**COMPILE)
def write(field, rule, token, ids, gates, kept, whole, is_number):
    """The token's ids and weights; slots beyond `kept` are skipped ones."""
    slots, experts = field[at.SLOTS], field[at.EXPERTS]
    numbers = carray(floats_at(rule[at.ROW_NUMBERS]), at.NUMBERS_HELD)
    out_ids = carray(longs_at(field[at.IDS] + token * slots * 8), slots)
    weights = carray(floats_at(field[at.WEIGHTS] + token * slots * 4), slots)
    if rule[at.ROW_FULL] == 0:
        whole = whole_of(field, rule, gates, kept)
    elif numbers[at.RENORMALISE] > 0:
        whole = between(field, rule, whole_of(field, rule, gates, kept), whole)
    share(field, gates, kept, whole, weights)
    for k in range(kept):
        out_ids[k] = ids[k]
        weights[k] *= numbers[at.SCALING]
    for k in range(kept, slots):
        out_ids[k] = experts
        weights[k] = 0.0
    if not is_number:  # NaN in, NaN out: whoever looks at the result must see it
        for k in range(rule[at.ROW_SLOTS]):
            out_ids[k] = k % experts
            weights[k] = np.float32(np.nan)
