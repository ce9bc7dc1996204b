"""The CPU kernel itself, compiled by numba on first use: sort the slots, run the experts.

One call: count and sort the used slots by expert; split them over the threads; each thread takes
its rows in blocks, expert by expert: first product, gate, second product, times the routing
weight, added to the token. A skipped slot is in no block, an expert without slots in no loop.

Letters: T tokens, K slots a token, E experts, M expert width, D hidden width. Rows of both
products are padded to whole vectors. Numbers and addresses arrive in one array of int64, see
`Field`; numba reads its entries as constants.
"""

# mypy: ignore-errors
# numba infers the types.

from __future__ import annotations

import functools

from numba import carray, njit
from numba.extending import register_jitable

from leanmoe.kernels.cpu import llvm_microkernel
from leanmoe.kernels.cpu.gemm import gate_rows, multiply_rows, padded_hidden, padded_width
from leanmoe.kernels.cpu.llvm_microkernel import ROWS, floats_at, ints_at, longs_at
from leanmoe.kernels.cpu.numba_compile import COMPILE, compile_program, stamp_of

(
    HIDDEN, IDS, GATES, OUT,
    GATE_UP, DOWN, GATE_UP_BIAS, DOWN_BIAS, NUMBERS, SCRATCH,
    TOKENS, SLOTS, EXPERTS, WIDTH_D, WIDTH_M, HAS_BIAS, IS_BF16, IS_GATED, ACTIVATION,
    THREADS, TEAM, THREAD_NUMBER, ENTRY, TASK, BY_TOKENS, USED,
    FIELDS,
) = range(27)  # fmt: skip

EXPERT_COST = 4
"""Reading an expert's weights costs a thread about as much as this many rows.

Measured: docs/results/kernels-cpu.md."""
ROWS_BY_TOKENS = 8
"""With this many rows an expert and thread, threads split the tokens and not the experts."""

COST_WORTH_A_THREAD = 64
"""In rows. With less for each, waiting for threads costs more than they save."""
FLOATS_WORTH_A_TEAM = 1 << 16
"""Fewer than these one thread adds up before the others have started."""
ROWS_TASK, SUMS_TASK = 1, 2
"""What a thread of the team finds in TASK."""
MOST_SUMS_BYTES = 1 << 26
"""When the threads' own sums would be larger than this, they split the tokens as well."""


def scratch_bytes(tokens, slots, experts, hidden, width, threads):
    """How much `run` needs at SCRATCH: shared, then as much again for each thread."""
    shared = _shared_bytes(tokens, slots, experts)
    return shared + threads * _block_bytes(hidden, width) + _sums_bytes(tokens, hidden, threads)


@register_jitable
def _whole_lines(size):
    return (size + 63) // 64 * 64


@register_jitable
def _shared_bytes(tokens, slots, experts):
    return _whole_lines((experts + 2) * 4) + _whole_lines(tokens * slots * 4) + 64


@register_jitable
def _block_bytes(hidden, width):
    """A thread's buffers for one block of rows."""
    columns = 3 * padded_width(width, False) + padded_hidden(hidden)
    return _whole_lines(ROWS * (4 * columns + 2 * 8)) + 4 * 64


@register_jitable
def _sums_bytes(tokens, hidden, threads):
    """The sums of all threads but the first, which adds to the result itself; 0 if too large."""
    size = (threads - 1) * tokens * hidden * 4
    return size if size <= MOST_SUMS_BYTES else 0


@njit(**COMPILE)
def _sort(field, starts, order):
    """Counting sort of the used slots by expert, tokens in order. The wrong id, or -1.

    starts[e] is where expert e's slots begin in `order`; starts[E] is the number of used slots.
    """
    experts, slots = field[EXPERTS], field[TOKENS] * field[SLOTS]
    ids = carray(longs_at(field[IDS]), slots)
    starts[:] = 0
    for s in range(slots):
        e = ids[s]
        if e < 0 or e > experts:
            return s
        starts[e + 1] += 1
    starts[experts + 1] = 0
    for e in range(experts):
        starts[e + 1] += starts[e]
    for s in range(slots):
        e = ids[s]
        if e < experts:
            order[starts[e]] = s
            starts[e] += 1
    for e in range(experts, 0, -1):
        starts[e] = starts[e - 1]
    starts[0] = 0
    return -1


@njit(**COMPILE)
def _token_at(field, share, parts):
    """The token before which `share` of `parts` equal parts of the used slots lie."""
    tokens, slots, experts = field[TOKENS], field[SLOTS], field[EXPERTS]
    if share == parts:
        return tokens
    ids = carray(longs_at(field[IDS]), tokens * slots)
    wanted, seen = field[USED] * share // parts, 0
    for t in range(tokens):
        if seen >= wanted:
            return t
        for k in range(slots):
            seen += ids[t * slots + k] < experts
    return tokens


@njit(**COMPILE)
def _first_not_before(order, low, high, slot):
    """Where in order[low:high], which ascends, the slots from `slot` on begin."""
    while low < high:
        middle = (low + high) // 2
        if order[middle] < slot:
            low = middle + 1
        else:
            high = middle
    return low


@njit(**COMPILE)
def _rows_block(field, buffers, expert, order, start, rows, out):
    """One expert's product for `rows` slots of `order`, added to their tokens in `out`."""
    product, narrow, wide, wide_rows, narrow_rows = buffers
    hidden, width, slots = field[WIDTH_D], field[WIDTH_M], field[SLOTS]
    is_bf16, is_gated = field[IS_BF16] == 1, field[IS_GATED] == 1
    inner = padded_width(width, is_gated)
    columns = 2 * inner if is_gated else inner
    size, wide_columns = 2 if is_bf16 else 4, padded_hidden(hidden)
    first = field[GATE_UP] + expert * hidden * columns * size
    second = field[DOWN] + expert * width * wide_columns * size
    gates = carray(floats_at(field[GATES]), field[TOKENS] * slots)
    numbers = carray(floats_at(field[NUMBERS]), 3)
    for r in range(rows):
        wide_rows[r] = field[HIDDEN] + order[start + r] // slots * hidden * 4
    bias = expert * 4 if field[HAS_BIAS] == 1 else 0
    multiply_rows(
        is_bf16, rows, wide_rows.ctypes.data, first, hidden,
        field[GATE_UP_BIAS] + bias * columns, product.ctypes.data, columns,
    )  # fmt: skip
    gate_rows(field[ACTIVATION], is_gated, numbers, product, narrow, rows, inner)
    multiply_rows(
        is_bf16, rows, narrow_rows.ctypes.data, second, width,
        field[DOWN_BIAS] + bias * wide_columns, wide.ctypes.data, wide_columns,
    )  # fmt: skip
    for r in range(rows):  # one after the other: a token may name an expert twice
        slot = order[start + r]
        gate, token = gates[slot], slot // slots
        total = out[token * hidden : (token + 1) * hidden]
        added = wide[r * wide_columns : r * wide_columns + hidden]
        for d in range(hidden):
            total[d] += gate * added[d]


@njit(**COMPILE)
def _floats(address, count):
    return carray(floats_at(address), count), address + _whole_lines(count * 4)


@njit(**COMPILE)
def _part(field, part, parts):
    """What one thread does."""
    tokens, slots, experts = field[TOKENS], field[SLOTS], field[EXPERTS]
    hidden, inner = field[WIDTH_D], padded_width(field[WIDTH_M], field[IS_GATED] == 1)
    shared, each = field[SCRATCH], _block_bytes(hidden, field[WIDTH_M])
    starts = carray(ints_at(shared), experts + 2)
    order = carray(ints_at(shared + _whole_lines((experts + 2) * 4)), tokens * slots)
    blocks_at = shared + _shared_bytes(tokens, slots, experts)
    product, address = _floats(blocks_at + part * each, ROWS * 2 * inner)
    narrow, address = _floats(address, ROWS * inner)
    wide, address = _floats(address, ROWS * padded_hidden(hidden))
    rows = carray(longs_at(address), 2 * ROWS)
    for r in range(ROWS):
        rows[ROWS + r] = narrow.ctypes.data + r * inner * 4
    buffers = (product, narrow, wide, rows[:ROWS], rows[ROWS:])
    target, size = field[OUT], tokens * hidden
    if part > 0 and field[BY_TOKENS] == 0:
        target = _sums_at(field) + (part - 1) * size * 4
    out = carray(floats_at(target), size)

    first, last = 0, tokens
    if field[BY_TOKENS] == 1:
        first, last = _token_at(field, part, parts), _token_at(field, part + 1, parts)
    out[first * hidden : last * hidden] = 0
    cost, whole_cost = 0, _cost(starts, experts)
    for e in range(experts):
        low, high = starts[e], starts[e + 1]
        if low == high:
            continue
        if field[BY_TOKENS] == 1:
            low = _first_not_before(order, low, high, first * slots)
            high = _first_not_before(order, low, high, last * slots)
        blocks = (high - low + ROWS - 1) // ROWS
        for b in range(blocks):
            start = low + (high - low) * b // blocks
            count = low + (high - low) * (b + 1) // blocks - start
            if field[BY_TOKENS] == 0:
                before = cost
                cost += count + (EXPERT_COST if b == 0 else 0)
                if (before + cost) * parts // (2 * whole_cost) != part:  # by the block's middle
                    continue
            _rows_block(field, buffers, e, order, start, count, out)


@njit(**COMPILE)
def _sums_at(field):
    """Where the sums of the threads after the first lie."""
    blocks_at = field[SCRATCH] + _shared_bytes(field[TOKENS], field[SLOTS], field[EXPERTS])
    return blocks_at + field[THREADS] * _block_bytes(field[WIDTH_D], field[WIDTH_M])


@njit(**COMPILE)
def _add_sums(field, part, parts):
    """Adds one part of the other threads' sums to the result, always in the same order."""
    size = field[TOKENS] * field[WIDTH_D]
    result = carray(floats_at(field[OUT]), size)
    for other in range(field[THREADS] - 1):
        sums = carray(floats_at(_sums_at(field) + other * size * 4), size)
        for i in range(size * part // parts, size * (part + 1) // parts):
            result[i] += sums[i]


@njit(**COMPILE)
def _cost(starts, experts):
    total = starts[experts] - starts[0]
    for e in range(experts):
        total += EXPERT_COST * (starts[e + 1] > starts[e])
    return total


@njit(**COMPILE)
def _whole_call(field):
    """Active experts + 2^32 x rows computed, or -1 - the slot with a wrong id."""
    tokens, slots, experts = field[TOKENS], field[SLOTS], field[EXPERTS]
    starts = carray(ints_at(field[SCRATCH]), experts + 2)
    order = carray(ints_at(field[SCRATCH] + _whole_lines((experts + 2) * 4)), tokens * slots)
    wrong = _sort(field, starts, order)
    if wrong >= 0:
        return -1 - wrong
    rows, active = starts[experts], 0
    for e in range(experts):
        active += starts[e + 1] > starts[e]
    field[USED] = rows
    worth = _cost(starts, experts) // COST_WORTH_A_THREAD
    threads = field[THREADS] = max(1, min(field[THREADS], worth))
    sums_bytes = _sums_bytes(tokens, field[WIDTH_D], threads)
    field[BY_TOKENS] = rows >= ROWS_BY_TOKENS * active * threads or sums_bytes == 0
    if threads == 1:
        _part(field, 0, 1)
        return (rows << 32) + active
    field[TASK] = ROWS_TASK
    llvm_microkernel.call_team(field[TEAM], field[ENTRY], field.ctypes.data, threads)
    if field[BY_TOKENS] == 0 and sums_bytes <= 4 * FLOATS_WORTH_A_TEAM:
        _add_sums(field, 0, 1)
    elif field[BY_TOKENS] == 0:
        field[TASK] = SUMS_TASK
        llvm_microkernel.call_team(field[TEAM], field[ENTRY], field.ctypes.data, threads)
    return (rows << 32) + active


@functools.cache
def entry() -> int:
    """Address of the program: a C function, int64 f(int64 fields[FIELDS])."""
    stamp = stamp_of("experts_program.py", "gemm.py", "llvm_microkernel.py")

    def program(argument):
        field = carray(argument, FIELDS)
        if field[TASK] == ROWS_TASK:
            _part(field, llvm_microkernel.call_int(field[THREAD_NUMBER]), field[THREADS])
        elif field[TASK] == SUMS_TASK:
            _add_sums(field, llvm_microkernel.call_int(field[THREAD_NUMBER]), field[THREADS])
        else:
            return _whole_call(field)
        return len(stamp)  # numba's cache sees one file; what is closed over is in its key

    return compile_program(program)
