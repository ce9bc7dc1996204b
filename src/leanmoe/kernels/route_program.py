"""Routing on the CPU, compiled by numba on first use: scores, a token's own experts, the step's.

One call: every thread takes some of the tokens and finds each one's own experts; where tokens
share experts, one thread then decides which are awake in each step, and every thread fills the
slots of its tokens from those. `leanmoe.routing.route` is the reference, and says what the fields
of a rule mean.

Shapes: S steps, T tokens in a step, E experts, K slots a token. Numbers and addresses arrive in
one array of int64.
"""

# mypy: ignore-errors
# numba infers the types.

from __future__ import annotations

import functools

import numpy as np
from numba import carray, njit
from numba.extending import register_jitable

from leanmoe.kernels import vector
from leanmoe.kernels.compiled import COMPILE, compile_program, stamp_of
from leanmoe.kernels.cpu_rows import padded
from leanmoe.kernels.vector import LANES, bytes_at, floats_at, ints_at, longs_at

(
    LOGITS, BIAS, ALLOWED, PADDING, IDS, WEIGHTS, OVER, NUMBERS, SCRATCH,
    STEPS, TOKENS, EXPERTS, SLOTS, FULL, LISTED, SCORING, NORMALISE, GROUPS, GROUPS_USED, GROUP_MAX,
    GUARANTEED, BUDGET, THREADS, TEAM, THREAD_NUMBER, ENTRY, TASK,
    FIELDS,
) = range(28)  # fmt: skip
"""BIAS, ALLOWED, PADDING and OVER are 0 where there is none; so are GUARANTEED and BUDGET. FULL is
the model's own top-k where its weights are kept, else 0; LISTED the larger of FULL and SLOTS."""

SOFTMAX, SIGMOID, SOFTMAX_AFTER = range(3)
THRESHOLD, TOP_P, EPSILON, SCALING = range(4)
"""Places in NUMBERS; a threshold or top_p below zero is none."""
OWN_TASK = 1
"""What a thread of the team finds in TASK."""
TOKENS_WORTH_A_THREAD = 48
"""With fewer for each, waiting for threads costs more than they save."""
VOTE_UNIT = 4294967296.0
"""Votes are added as whole numbers of 1/2^32, as the reference adds them."""
NEVER = np.float32(-np.inf)
INFINITE = np.float32(np.inf)
TINY = np.float32(np.finfo(np.float32).tiny)


def scratch_bytes(tokens, experts, listed, threads, has_company):
    """What `SCRATCH` must hold: a row of scores a thread, or a token where tokens share."""
    rows = tokens if has_company else threads
    lines = 2 * rows * padded(experts, LANES) * 4 + 2 * tokens * listed * 4
    return lines + 2 * tokens * 4 + 10 * padded(experts, LANES) + 256


@register_jitable
def _scores_at(field, row):
    """The gates and the ranking of one token, each padded to whole vectors."""
    width = padded(field[EXPERTS], LANES)
    at = field[SCRATCH] + 2 * row * width * 4
    return carray(floats_at(at), width), carray(floats_at(at + width * 4), width)


@register_jitable
def _lists_at(field, rows):
    """Each token's own experts, their number and whole weight; a step's votes and awake experts."""
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
    awake = carray(bytes_at(at + width * 8), width)
    return own, own_gates, counts, wholes, votes, awake


@register_jitable
def _remains(field, expert):
    """Whether an expert is not pruned."""
    return field[ALLOWED] == 0 or carray(bytes_at(field[ALLOWED]), field[EXPERTS])[expert] != 0


@njit(**COMPILE)
def _score(field, token, gates, ranking):
    """Fills in a token's gates and ranking; whether they are numbers."""
    experts, width = field[EXPERTS], padded(field[EXPERTS], LANES)
    logits = carray(floats_at(field[LOGITS] + token * experts * 4), experts)
    if field[SCORING] == SOFTMAX_AFTER:
        for e in range(experts):
            gates[e] = logits[e]
    elif field[SCORING] == SIGMOID:
        for e in range(experts):
            gates[e] = logits[e]
        for e in range(experts, width):
            gates[e] = 0.0
        vector.sigmoid(gates.ctypes.data, width // LANES)
    else:
        # A pruned model's softmax knows nothing of the experts that are gone.
        best = NEVER
        for e in range(experts):
            best = logits[e] if _remains(field, e) and logits[e] > best else best
        for e in range(experts):
            gates[e] = logits[e] - best if _remains(field, e) else 0.0
        for e in range(experts, width):
            gates[e] = 0.0
        vector.exponential(gates.ctypes.data, width // LANES)
        total = np.float32(0.0)
        for e in range(experts):
            gates[e] = gates[e] if _remains(field, e) else 0.0
        for e in range(experts):
            total += gates[e]
        for e in range(experts):
            gates[e] /= total
    not_numbers = 0
    for e in range(experts):
        not_numbers += not np.abs(gates[e]) < INFINITE
        ranking[e] = gates[e]
    if field[BIAS] != 0:
        bias = carray(floats_at(field[BIAS]), experts)
        for e in range(experts):
            ranking[e] += bias[e]
    if field[ALLOWED] != 0:
        allowed = carray(bytes_at(field[ALLOWED]), experts)
        for e in range(experts):
            if allowed[e] == 0:
                ranking[e] = NEVER
    return not_numbers == 0


@njit(**COMPILE)
def _limit_groups(field, ranking):
    """Ranks the experts of all but the token's best groups last."""
    groups, size = field[GROUPS], field[EXPERTS] // field[GROUPS]
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
        if field[GROUP_MAX] == 1 or second == NEVER:
            value[g] = first
        else:
            value[g] = first + second
    for g in range(groups):
        better = 0
        for other in range(groups):
            if value[other] > value[g] or (value[other] == value[g] and other < g):
                better += 1
        if better >= field[GROUPS_USED]:
            for e in range(g * size, (g + 1) * size):
                ranking[e] = NEVER


@njit(**COMPILE)
def _insert(ids, ranks, found, most, expert, rank):
    """Keeps the best `most` experts in order, the lower id first among equals; how many."""
    if found == most:
        if rank <= ranks[found - 1]:
            return found
    else:
        found += 1
    place = found - 1
    while place > 0 and ranks[place - 1] < rank:
        ranks[place], ids[place] = ranks[place - 1], ids[place - 1]
        place -= 1
    ranks[place], ids[place] = rank, expert
    return found


@njit(**COMPILE)
def _keep(field, ids, gates, found):
    """Drops what threshold and top_p drop, in place; how many are left."""
    numbers = carray(floats_at(field[NUMBERS]), 4)
    threshold, top_p = numbers[THRESHOLD], numbers[TOP_P]
    if found == 0 or (threshold < 0 and top_p < 0):
        return found
    mass = np.empty(found, np.float32)
    best = gates[0]
    for k in range(found):
        best = gates[k] if gates[k] > best else best
    total = np.float32(0.0)
    for k in range(found):
        mass[k] = np.exp(gates[k] - best) if field[SCORING] == SOFTMAX_AFTER else gates[k]
        total += mass[k]
    best = np.float32(1.0) if field[SCORING] == SOFTMAX_AFTER else best
    kept, before = 0, np.float32(0.0)
    for k in range(found):
        if threshold >= 0 and mass[k] < threshold * best:
            continue
        if top_p >= 0 and before > 0 and before >= top_p * total:
            break
        before += mass[k]
        ids[kept], gates[kept] = ids[k], gates[k]
        kept += 1
    return kept


@njit(**COMPILE)
def _whole(field, gates, count):
    """What the shares of these slots are taken of: their sum, or that of their exponentials."""
    if field[SCORING] == SOFTMAX_AFTER:
        best, total = NEVER, np.float32(0.0)
        for k in range(count):
            best = gates[k] if gates[k] > best else best
        for k in range(count):
            total += np.exp(gates[k] - best)
        return best + np.log(total)
    if field[NORMALISE] == 0:
        return np.float32(1.0)
    total = np.float32(0.0)
    for k in range(count):
        total += gates[k]
    total += carray(floats_at(field[NUMBERS]), 4)[EPSILON]
    return TINY if total < TINY else total


@njit(**COMPILE)
def _share(field, gates, kept, whole, shares):
    """What each kept slot weighs before scaling."""
    if field[SCORING] == SOFTMAX_AFTER:
        for k in range(kept):
            shares[k] = np.exp(gates[k] - whole)
    else:
        for k in range(kept):
            shares[k] = gates[k] / whole


@njit(**COMPILE)
def _write(field, token, ids, gates, kept, whole, is_number):
    """The token's ids and weights; slots beyond `kept` are skipped ones."""
    slots, experts = field[SLOTS], field[EXPERTS]
    numbers = carray(floats_at(field[NUMBERS]), 4)
    out_ids = carray(longs_at(field[IDS] + token * slots * 8), slots)
    weights = carray(floats_at(field[WEIGHTS] + token * slots * 4), slots)
    if field[FULL] == 0:
        whole = _whole(field, gates, kept)
    _share(field, gates, kept, whole, weights)
    for k in range(kept):
        out_ids[k] = ids[k]
        weights[k] *= numbers[SCALING]
    for k in range(kept, slots):
        out_ids[k] = experts
        weights[k] = 0.0
    if not is_number:  # NaN in, NaN out: whoever looks at the result must see it
        for k in range(slots):
            out_ids[k] = k % experts
            weights[k] = np.float32(np.nan)


@njit(**COMPILE)
def _own(field, part, parts):
    """Every token's own experts; written out where tokens do not share."""
    experts, slots, tokens = field[EXPERTS], field[SLOTS], field[STEPS] * field[TOKENS]
    shares = field[GUARANTEED] > 0 or field[BUDGET] > 0
    rows = tokens if shares else field[THREADS]
    own, own_gates, counts, wholes, _votes, _awake = _lists_at(field, rows)
    listed = field[LISTED]
    padding = carray(bytes_at(field[PADDING]), tokens)
    ranks = np.empty(listed, np.float32)
    for token in range(tokens * part // parts, tokens * (part + 1) // parts):
        ids, picked = own[token * listed :], own_gates[token * listed :]
        if field[PADDING] != 0 and padding[token] != 0:
            counts[token] = 0
            if not shares:
                _write(field, token, ids, picked, 0, np.float32(1.0), True)
            continue
        gates, ranking = _scores_at(field, token if shares else part)
        is_number = _score(field, token, gates, ranking)
        if field[GROUPS] > 1:
            _limit_groups(field, ranking)
        found = 0
        for e in range(experts):
            if ranking[e] > NEVER:
                found = _insert(ids, ranks, found, listed, e, ranking[e])
        for k in range(found):
            picked[k] = gates[ids[k]]
        if field[FULL] > 0:
            wholes[token] = _whole(field, picked, min(found, field[FULL]))
        kept = _keep(field, ids, picked, min(found, slots))
        counts[token] = kept if is_number else -1
        if not shares:
            _write(field, token, ids, picked, kept, wholes[token], is_number)


@njit(**COMPILE)
def _wake(field, step):
    """Adds up a step's guaranteed experts and votes: awake is 1 for guaranteed, 2 for a best."""
    listed, tokens = field[LISTED], field[TOKENS]
    own, own_gates, counts, _wholes, votes, awake = _lists_at(field, field[STEPS] * tokens)
    shares = np.empty(listed, np.float32)
    awake[:] = 0
    votes[:] = 0
    for token in range(step * tokens, (step + 1) * tokens):
        ids, gates = own[token * listed :], own_gates[token * listed :]
        kept = counts[token]
        if kept <= 0:
            continue
        for k in range(min(kept, field[GUARANTEED])):
            awake[ids[k]] |= 1
        awake[ids[0]] |= 2
        if field[BUDGET] > 0:
            _share(field, gates, kept, _whole(field, gates, kept), shares)
            for k in range(kept):
                votes[ids[k]] += np.int64(np.float32(shares[k]) * VOTE_UNIT) + 1


@njit(**COMPILE)
def _afford(field, step):
    """Leaves awake every token's best and the most voted-for, while the budget lasts."""
    experts = field[EXPERTS]
    votes, awake = _lists_at(field, field[STEPS] * field[TOKENS])[4:]
    spent = 0
    for e in range(experts):
        if field[GUARANTEED] > 0 and awake[e] == 0:
            votes[e] = 0
        spent += awake[e] >= 2
        awake[e] = 1 if awake[e] >= 2 else 0
    over = carray(bytes_at(field[OVER]), field[STEPS])
    over[step] = 1 if spent > field[BUDGET] else 0
    while spent < field[BUDGET]:
        best, most = -1, np.int64(0)
        for e in range(experts):
            if awake[e] == 0 and votes[e] > most:
                best, most = e, votes[e]
        if best < 0:
            break
        awake[best] = 1
        spent += 1


@njit(**COMPILE)
def _fill(field, step):
    """Every token's slots: its own experts that are awake, then the awake that follow."""
    experts, slots, tokens = field[EXPERTS], field[SLOTS], field[TOKENS]
    own, own_gates, counts, wholes, _votes, awake = _lists_at(field, field[STEPS] * tokens)
    listed = field[LISTED]
    ids, ranks = np.empty(slots, np.int32), np.empty(slots, np.float32)
    picked = np.empty(slots, np.float32)
    for token in range(step * tokens, (step + 1) * tokens):
        kept = counts[token]
        if kept < 0:
            _write(field, token, ids, picked, 0, wholes[token], False)
            continue
        found = 0
        for k in range(kept):
            expert = own[token * listed + k]
            if awake[expert] != 0:
                ids[found] = expert
                picked[found] = own_gates[token * listed + k]
                found += 1
        if found < kept:
            gates, ranking = _scores_at(field, token)
            more = 0
            for e in range(experts):
                if awake[e] != 0 and ranking[e] > NEVER:
                    is_own = False
                    for k in range(kept):
                        is_own |= own[token * listed + k] == e
                    if not is_own:
                        more = _insert(ids[found:], ranks, more, kept - found, e, ranking[e])
            for k in range(found, found + more):
                picked[k] = gates[ids[k]]
            found += more
        _write(field, token, ids, picked, found, wholes[token], True)


@njit(**COMPILE)
def _whole_call(field):
    """Own experts on all threads, then step by step who is awake and who uses them."""
    tokens = field[STEPS] * field[TOKENS]
    threads = field[THREADS] = max(1, min(field[THREADS], tokens // TOKENS_WORTH_A_THREAD))
    field[TASK] = OWN_TASK
    if threads == 1:
        _own(field, 0, 1)
    else:
        vector.call_team(field[TEAM], field[ENTRY], field.ctypes.data, threads)
    if field[GUARANTEED] == 0 and field[BUDGET] == 0:
        return 0
    for step in range(field[STEPS]):
        _wake(field, step)
        if field[BUDGET] > 0:
            _afford(field, step)
        _fill(field, step)
    return 0


@functools.cache
def entry() -> int:
    """Address of the program: a C function, int64 f(int64 fields[FIELDS])."""
    stamp = stamp_of("route_program.py", "cpu_rows.py", "vector.py")

    def program(argument):
        field = carray(argument, FIELDS)
        if field[TASK] == OWN_TASK:
            _own(field, vector.call_int(field[THREAD_NUMBER]), field[THREADS])
        else:
            _whole_call(field)
        return len(stamp)  # numba's cache sees one file; what is closed over is in its key

    return compile_program(program)
