"""Slots to expert blocks on the device: count by expert, cut into blocks.

Letters: X the T*K slots of T tokens, E experts.

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
    counts_1E, starts_1E, blocks_ptr, used_ptr, most_blocks,
    BLOCK_ROWS: tl.constexpr, PADDED_E: tl.constexpr,
):  # fmt: skip
    """Cuts each expert's rows, which begin at `starts_1E`, into blocks; one program does it all.

    Everybody waits for this, and with a busy expert the loop is long. So it is lean: two blocks of
    each expert at a time, at addresses that go on from the last two. And all of it has a second
    dimension, by which the compiler tells it from what else a program has E of: it would have it
    lie in registers as logits do, four to a thread, and move it in the loop to store it.
    """
    e = tl.arange(0, PADDED_E)[None, :]
    blocks_1E = (counts_1E + BLOCK_ROWS - 1) // BLOCK_ROWS
    first_1E = tl.cumsum(blocks_1E, axis=1) - blocks_1E
    expert_at, start_at = blocks_ptr + first_1E, blocks_ptr + most_blocks + first_1E
    rows_at, left = blocks_ptr + 2 * most_blocks + first_1E, tl.max(counts_1E)
    tl.store(used_ptr, tl.sum(blocks_1E))
    while left > 0:
        for i in tl.static_range(2):
            inside = counts_1E > i * BLOCK_ROWS
            tl.store(expert_at + i, e, mask=inside)
            tl.store(start_at + i, starts_1E + i * BLOCK_ROWS, mask=inside)
            tl.store(rows_at + i, tl.minimum(counts_1E - i * BLOCK_ROWS, BLOCK_ROWS), mask=inside)
        expert_at, start_at, rows_at = expert_at + 2, start_at + 2, rows_at + 2
        starts_1E += 2 * BLOCK_ROWS
        counts_1E -= 2 * BLOCK_ROWS
        left -= 2 * BLOCK_ROWS


@triton.jit(do_not_specialize=["slots", "most_blocks"])
def group_slots(
    # pointers
    ids_ptr, counts_ptr, places_ptr, starts_ptr, rows_ptr, blocks_ptr, used_ptr,
    # sizes and numbers
    slots, most_blocks,
    # compile-time
    E: tl.constexpr, PADDED_E: tl.constexpr, BLOCK_ROWS: tl.constexpr, CHUNK: tl.constexpr,
    IS_ONE: tl.constexpr,
):  # fmt: skip
    """Each slot's place among its expert's; the last program cuts blocks.

    Where one program sees all slots it also writes `rows`; `scatter_slots` does it otherwise.
    `counts_ptr` holds E counters and one of programs.
    """
    n = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    ids_X = tl.load(ids_ptr + n, mask=n < slots, other=E).to(tl.int32)
    is_used = (ids_X >= 0) & (ids_X < E)
    place_X = tl.atomic_add(counts_ptr + ids_X, 1, mask=is_used, sem="relaxed")
    if not IS_ONE:
        tl.store(places_ptr + n, place_X, mask=is_used)
    if is_last(counts_ptr + E, tl.num_programs(0)):
        e = tl.arange(0, PADDED_E)
        counts_E = tl.load(counts_ptr + e, mask=e < E, other=0, cache_modifier=".cg")
        starts_E = tl.cumsum(counts_E, axis=0) - counts_E
        tl.store(starts_ptr + e, starts_E, mask=e < E)
        write_blocks(
            counts_E[None, :], starts_E[None, :], blocks_ptr, used_ptr, most_blocks, BLOCK_ROWS,
            PADDED_E,
        )  # fmt: skip
        tl.debug_barrier()
        tl.store(counts_ptr + e, 0, mask=e < E)
        if IS_ONE:
            start_X = tl.load(starts_ptr + ids_X, mask=is_used, other=0, cache_modifier=".cg")
            tl.store(rows_ptr + start_X + place_X, n, mask=is_used)


@triton.jit(do_not_specialize=["slots"])
def scatter_slots(
    ids_ptr, places_ptr, starts_ptr, rows_ptr, slots, E: tl.constexpr, CHUNK: tl.constexpr
):
    """Writes each slot's number where its expert's rows lie."""
    n = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    ids_X = tl.load(ids_ptr + n, mask=n < slots, other=E)
    is_used = (ids_X >= 0) & (ids_X < E)
    start_X = tl.load(starts_ptr + ids_X, mask=is_used, other=0)
    place_X = tl.load(places_ptr + n, mask=is_used, other=0)
    tl.store(rows_ptr + start_X + place_X, n, mask=is_used)
