"""Slots to a work list on the device: count by expert, cut into blocks.

Letters: T tokens, K slots a token, N = T*K slots, E experts, B blocks.

Counters lie in memory that is zero before and after. The program that is last to arrive sees what
all others counted, does what needs all of it, and makes the counters zero again.
"""

# mypy: ignore-errors
# Triton's language is not Python's: names are constexprs, tensors or pointers as they are used.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_last(arrived_ptr, programs):
    """Whether all other programs have been here; what they wrote before can then be read.

    Whoever is last makes the counter zero again.
    """
    tl.debug_barrier()  # every thread's writes come before this program counts as arrived
    before = tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
    last = before == programs - 1
    if last:
        tl.store(arrived_ptr, 0)
    return last


@triton.jit
def is_last_answered(arrived_ptr, programs, answers):
    """As `is_last`, for programs that tell each other by atomics alone; these are their answers.

    A count that was answered is where all others will read it, so no program need wait for what it
    wrote besides: that is read in another launch. Answers are never negative, which the compiler
    does not know: it cannot let a program arrive before them.
    """
    one = 1 + (tl.min(answers, axis=0) < 0).to(tl.int32)
    last = tl.atomic_add(arrived_ptr, one, sem="relaxed") == programs - 1
    if last:
        tl.store(arrived_ptr, 0)
    return last


@triton.jit
def write_blocks(
    counts_E, starts_E, blocks_ptr, used_ptr, most_blocks,
    ROWS: tl.constexpr, PADDED_E: tl.constexpr,
):  # fmt: skip
    """Cuts each expert's rows, which begin at `starts_E`, into blocks; one program does it all."""
    e = tl.arange(0, PADDED_E)
    blocks_E = (counts_E + ROWS - 1) // ROWS
    first_E = tl.cumsum(blocks_E, axis=0) - blocks_E
    most, j = tl.max(blocks_E, axis=0), 0
    while j < most:
        at_E = blocks_ptr + first_E + j
        inside = j < blocks_E
        tl.store(at_E, e, mask=inside)
        tl.store(at_E + most_blocks, starts_E + j * ROWS, mask=inside)
        tl.store(at_E + 2 * most_blocks, tl.minimum(counts_E - j * ROWS, ROWS), mask=inside)
        j += 1
    tl.store(used_ptr, tl.sum(blocks_E, axis=0))


@triton.jit(do_not_specialize=["slots", "most_blocks"])
def group_slots(
    ids_ptr, counts_ptr, places_ptr, starts_ptr, rows_ptr, blocks_ptr, used_ptr,
    slots, most_blocks,
    E: tl.constexpr, PADDED_E: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    IS_ONE: tl.constexpr,
):  # fmt: skip
    """Each slot's place among its expert's; the last program cuts blocks.

    Where one program sees all slots it also writes `rows`; `scatter_slots` does it otherwise.
    `counts_ptr` holds E counters and one of programs.
    """
    n = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    ids_N = tl.load(ids_ptr + n, mask=n < slots, other=E).to(tl.int32)
    is_used = (ids_N >= 0) & (ids_N < E)
    place_N = tl.atomic_add(counts_ptr + ids_N, 1, mask=is_used, sem="relaxed")
    if not IS_ONE:
        tl.store(places_ptr + n, place_N, mask=is_used)
    if is_last(counts_ptr + E, tl.num_programs(0)):
        e = tl.arange(0, PADDED_E)
        counts_E = tl.load(counts_ptr + e, mask=e < E, other=0, cache_modifier=".cg")
        starts_E = tl.cumsum(counts_E, axis=0) - counts_E
        tl.store(starts_ptr + e, starts_E, mask=e < E)
        write_blocks(counts_E, starts_E, blocks_ptr, used_ptr, most_blocks, ROWS, PADDED_E)
        tl.debug_barrier()
        tl.store(counts_ptr + e, 0, mask=e < E)
        if IS_ONE:
            start_N = tl.load(starts_ptr + ids_N, mask=is_used, other=0, cache_modifier=".cg")
            tl.store(rows_ptr + start_N + place_N, n, mask=is_used)


@triton.jit(do_not_specialize=["slots"])
def scatter_slots(
    ids_ptr, places_ptr, starts_ptr, rows_ptr, slots, E: tl.constexpr, CHUNK: tl.constexpr
):
    """Writes each slot's number where its expert's rows lie."""
    n = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    ids_N = tl.load(ids_ptr + n, mask=n < slots, other=E)
    is_used = (ids_N >= 0) & (ids_N < E)
    start_N = tl.load(starts_ptr + ids_N, mask=is_used, other=0)
    place_N = tl.load(places_ptr + n, mask=is_used, other=0)
    tl.store(rows_ptr + start_N + place_N, n, mask=is_used)
