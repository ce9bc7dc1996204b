"""Routing on the CPU, compiled by numba on first use: scores, a token's own experts, the step's.

One call: every thread takes some of the tokens and finds each one's own experts
(route_token.py); where tokens share experts, one thread then decides which are active in each step,
and fills the slots of every token from those. `leanmoe.routing.route` is the reference.
"""

# mypy: ignore-errors
# numba infers the types.

from __future__ import annotations

import functools

import numpy as np
from numba import carray, njit

from leanmoe.kernels.cpu import llvm_microkernel
from leanmoe.kernels.cpu import route_args as at
from leanmoe.kernels.cpu.llvm_microkernel import bytes_at
from leanmoe.kernels.cpu.numba_compile import COMPILE, compile_program, stamp_of
from leanmoe.kernels.cpu.route_args import lists_at, rule_of, scores_at
from leanmoe.kernels.cpu.route_token import (
    NEVER,
    insert,
    keep,
    limit_groups,
    score,
    share,
    whole_of,
    write,
)

OWN_TASK = 1
"""What a thread of the team finds in TASK."""
TOKENS_WORTH_A_THREAD = 48
"""With fewer for each, waiting for threads costs more than they save."""
VOTE_UNIT = 4294967296.0
"""Votes are added as whole numbers of 1/2^32, as the reference adds them."""


@njit(**COMPILE)
def _own(field, part, parts):
    """Every token's own experts; written out where tokens do not share."""
    experts, tokens = field[at.EXPERTS], field[at.STEPS] * field[at.TOKENS]
    shares = field[at.SHARES] != 0
    rows = tokens if shares else field[at.THREADS]
    own, own_gates, counts, wholes, _votes, _active = lists_at(field, rows)
    listed = field[at.LISTED]
    padding = carray(bytes_at(field[at.PADDING]), tokens)
    ranks = np.empty(listed, np.float32)
    for token in range(tokens * part // parts, tokens * (part + 1) // parts):
        ids, picked = own[token * listed :], own_gates[token * listed :]
        rule = rule_of(field, token)
        slots, full = rule[at.ROW_SLOTS], rule[at.ROW_FULL]
        if slots == 0 or (field[at.PADDING] != 0 and padding[token] != 0):
            counts[token] = 0
            if not shares:
                write(field, rule, token, ids, picked, 0, np.float32(1.0), True)
            continue
        gates, ranking = scores_at(field, token if shares else part)
        is_number = score(field, rule, token, gates, ranking)
        if field[at.GROUPS] > 1:
            limit_groups(field, ranking)
        count, most = 0, max(slots, full)
        for e in range(experts):
            if ranking[e] > NEVER:
                count = insert(ids, ranks, count, most, e, ranking[e])
        for k in range(count):
            picked[k] = gates[ids[k]]
        if full > 0:
            wholes[token] = whole_of(field, rule, picked, min(count, full))
        kept = keep(field, rule, ids, picked, min(count, slots))
        counts[token] = kept if is_number else -1
        if not shares:
            write(field, rule, token, ids, picked, kept, wholes[token], is_number)


@njit(**COMPILE)
def _activates(field, step):
    """Adds up a step's marks and votes: active is 1 for a marked expert, 2 for one that must be."""
    listed, tokens = field[at.LISTED], field[at.TOKENS]
    own, own_gates, counts, _wholes, votes, active = lists_at(field, field[at.STEPS] * tokens)
    shares = np.empty(listed, np.float32)
    active[:] = 0
    votes[:] = 0
    for token in range(step * tokens, (step + 1) * tokens):
        ids, gates = own[token * listed :], own_gates[token * listed :]
        kept = counts[token]
        if kept <= 0:
            continue
        rule = rule_of(field, token)
        for k in range(min(kept, rule[at.ROW_MARKS])):
            active[ids[k]] |= 1
        if field[at.BUDGET] == 0 or rule[at.ROW_MARKS] == 0:
            continue
        for k in range(min(kept, rule[at.ROW_MUST])):
            active[ids[k]] |= 2
        if rule[at.ROW_MUST] < rule[at.ROW_SLOTS]:  # else no vote decides anything
            share(field, gates, kept, whole_of(field, rule, gates, kept), shares)
            for k in range(kept):
                votes[ids[k]] += np.int64(np.float32(shares[k]) * VOTE_UNIT) + 1


@njit(**COMPILE)
def _afford(field, step):
    """Keeps active every token's best and the most voted-for, while the budget lasts."""
    experts = field[at.EXPERTS]
    votes, active = lists_at(field, field[at.STEPS] * field[at.TOKENS])[4:]
    spent = 0
    for e in range(experts):
        if active[e] == 0:
            votes[e] = 0
        spent += active[e] >= 2
        active[e] = 1 if active[e] >= 2 else 0
    over = carray(bytes_at(field[at.OVER]), field[at.STEPS])
    over[step] = 1 if spent > field[at.BUDGET] else 0
    while spent < field[at.BUDGET]:
        best, most = -1, np.int64(0)
        for e in range(experts):
            if active[e] == 0 and votes[e] > most:
                best, most = e, votes[e]
        if best < 0:
            break
        active[best] = 1
        spent += 1


@njit(**COMPILE)
def _fill(field, step):
    """Every token's slots: its own active experts, then the active ones that follow."""
    experts, slots, tokens = field[at.EXPERTS], field[at.SLOTS], field[at.TOKENS]
    own, own_gates, counts, wholes, _votes, active = lists_at(field, field[at.STEPS] * tokens)
    listed = field[at.LISTED]
    ids, ranks = np.empty(slots, np.int32), np.empty(slots, np.float32)
    picked = np.empty(slots, np.float32)
    for token in range(step * tokens, (step + 1) * tokens):
        kept = counts[token]
        rule = rule_of(field, token)
        if kept < 0:
            write(field, rule, token, ids, picked, 0, wholes[token], False)
            continue
        count = 0
        for k in range(kept):
            expert = own[token * listed + k]
            if active[expert] != 0 or k < rule[at.ROW_OWN]:
                ids[count] = expert
                picked[count] = own_gates[token * listed + k]
                count += 1
        if count < kept:
            gates, ranking = scores_at(field, token)
            more = 0
            for e in range(experts):
                if active[e] != 0 and ranking[e] > NEVER:
                    is_own = False
                    for k in range(kept):
                        is_own |= own[token * listed + k] == e
                    if not is_own:
                        more = insert(ids[count:], ranks, more, kept - count, e, ranking[e])
            for k in range(count, count + more):
                picked[k] = gates[ids[k]]
            count += more
        write(field, rule, token, ids, picked, count, wholes[token], True)


@njit(**COMPILE)
def _whole_call(field):
    """Own experts on all threads, then step by step which are active and who uses them."""
    tokens = field[at.STEPS] * field[at.TOKENS]
    threads = field[at.THREADS] = max(1, min(field[at.THREADS], tokens // TOKENS_WORTH_A_THREAD))
    field[at.TASK] = OWN_TASK
    if threads == 1:
        _own(field, 0, 1)
    else:
        llvm_microkernel.call_team(field[at.TEAM], field[at.ENTRY], field.ctypes.data, threads)
    if field[at.SHARES] == 0:
        return 0
    for step in range(field[at.STEPS]):
        _activates(field, step)
        if field[at.BUDGET] > 0:
            _afford(field, step)
        _fill(field, step)
    return 0


@functools.cache
def entry() -> int:
    """Address of the program: a C function, int64 f(int64 fields[at.FIELDS])."""
    own = ("route_program.py", "route_token.py", "route_args.py")
    stamp = stamp_of(*own, "gemm.py", "llvm_microkernel.py")

    def program(argument):
        field = carray(argument, at.FIELDS)
        if field[at.TASK] == OWN_TASK:
            _own(field, llvm_microkernel.call_int(field[at.THREAD_NUMBER]), field[at.THREADS])
        else:
            _whole_call(field)
        return len(stamp)  # numba's cache sees one file; what is closed over is in its key

    return compile_program(program)
