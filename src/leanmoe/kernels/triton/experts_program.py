"""The experts over expert blocks: first product, second product, sum over each token's slots.

Letters: T tokens, K slots a token, E experts, D hidden width, M expert width, X rows of one block
(slots of one expert), J columns of one tile of a product, I columns it is summed over.
"""

# mypy: ignore-errors
# Triton's language is not Python's: names are constexprs, tensors or pointers as they are used.

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from leanmoe.kernels.triton.tile_program import down_block, gate_up_block


@triton.jit
def _rows_of(rows_ptr, first, count, skip, BLOCK_M: tl.constexpr):
    """Slot numbers of a block's rows from `skip` on, and which of them there are."""
    r = skip + tl.arange(0, BLOCK_M)
    is_row = r < count
    return tl.load(rows_ptr + first + r, mask=is_row, other=0), is_row


@triton.jit
def _place(used, TILES, fixed: tl.constexpr):
    """Block, tile and subblock of this program.

    The subblocks of a block run side by side at each tile of columns, and so do `GROUP_M` blocks:
    they find its weights in L2.
    """
    GROUP_M: tl.constexpr = fixed.GROUP_M
    pid, part = tl.program_id(0) // fixed.SUBBLOCKS, tl.program_id(0) % fixed.SUBBLOCKS
    if GROUP_M == 1:
        block, tile = pid // TILES, pid % TILES
    else:
        group = pid // (GROUP_M * TILES)
        height = tl.minimum(used - group * GROUP_M, GROUP_M)
        inside = pid - group * GROUP_M * TILES
        if inside < height * TILES:
            block, tile = group * GROUP_M + inside % height, inside // height
        else:  # the last group has fewer blocks than programs for them
            block, tile = used, 0
    return block, tile, part


@triton.jit
def _block_of(blocks_ptr, most_blocks, block):
    """Expert, first place in `rows` and number of rows of a block."""
    expert = tl.load(blocks_ptr + block)
    first = tl.load(blocks_ptr + most_blocks + block)
    return expert, first, tl.load(blocks_ptr + 2 * most_blocks + block)


@triton.jit
def _subblock_of(blocks_ptr, most_blocks, block, part, fixed: tl.constexpr):
    """Expert, first place in `rows` and number of rows of a block's subblock.

    All but the last have `BLOCK_M`; it may have a tail, and those after it have no row. Read before
    it is known whether there is such a block, so that one need not wait for the other.
    """
    BLOCK_M: tl.constexpr = fixed.BLOCK_M
    is_inside = block < most_blocks
    expert = tl.load(blocks_ptr + block, mask=is_inside, other=0)
    first = tl.load(blocks_ptr + most_blocks + block, mask=is_inside, other=0)
    count = tl.load(blocks_ptr + 2 * most_blocks + block, mask=is_inside, other=0)
    last = tl.maximum((count - fixed.TAIL_M + BLOCK_M - 1) // BLOCK_M, 1) - 1
    count = tl.where(part < last, BLOCK_M, tl.where(part == last, count - last * BLOCK_M, 0))
    return expert, first + part * BLOCK_M, count


@triton.jit
def _gate_up_rows(
    # pointers
    x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr, rows_ptr,
    # rows and places
    expert, first, count, tile,
    # sizes and numbers
    limit, alpha, up_offset,
    # compile-time
    fixed: tl.constexpr, TAIL_M: tl.constexpr,
):  # fmt: skip
    """The first product of one block and one tile, with so long a tail."""
    slots_X, is_row = _rows_of(rows_ptr, first, count, 0, fixed.BLOCK_M)
    slots_tail, is_tail = slots_X, is_row
    if TAIL_M > 0:
        slots_tail, is_tail = _rows_of(rows_ptr, first, count, fixed.BLOCK_M, TAIL_M)
    gate_up_block(
        x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr,
        expert, (slots_X // fixed.K).to(tl.int64), slots_X, is_row,
        (slots_tail // fixed.K).to(tl.int64), slots_tail, is_tail,
        tile, limit, alpha, up_offset, fixed, TAIL_M,
    )  # fmt: skip


@triton.jit(do_not_specialize=["most_blocks"])
def gate_up_grouped(
    # pointers
    x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr, rows_ptr, blocks_ptr,
    used_ptr,
    # sizes and numbers
    most_blocks, limit, alpha, up_offset,
    # compile-time
    fixed: tl.constexpr,
):  # fmt: skip
    """The first product of one block and one tile of columns."""
    if fixed.USE_PDL:
        gdc_wait()
        gdc_launch_dependents()  # not before: whoever comes next relies on what was waited for
    used = tl.load(used_ptr)
    block, tile, part = _place(used, (fixed.M + fixed.BLOCK_N - 1) // fixed.BLOCK_N, fixed)
    if fixed.SUBBLOCKS > 1:
        expert, first, count = _subblock_of(blocks_ptr, most_blocks, block, part, fixed)
    if block >= used:
        return
    if fixed.SUBBLOCKS == 1:
        expert, first, count = _block_of(blocks_ptr, most_blocks, block)
    elif count <= 0:
        return
    TAIL_M: tl.constexpr = fixed.TAIL_M
    HALF_TAIL: tl.constexpr = TAIL_M // 2 if TAIL_M > 16 else 0
    if TAIL_M > 0 and count > fixed.BLOCK_M + HALF_TAIL:
        _gate_up_rows(
            x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr, rows_ptr,
            expert, first, count, tile, limit, alpha, up_offset, fixed, TAIL_M,
        )  # fmt: skip
        return
    if HALF_TAIL > 0 and count > fixed.BLOCK_M:
        _gate_up_rows(
            x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr, rows_ptr,
            expert, first, count, tile, limit, alpha, up_offset, fixed, HALF_TAIL,
        )  # fmt: skip
        return
    _gate_up_rows(
        x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr, rows_ptr,
        expert, first, count, tile, limit, alpha, up_offset, fixed, 0,
    )  # fmt: skip


@triton.jit
def _down_rows(
    # pointers
    act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr, gates_ptr, rows_ptr,
    # rows and places
    expert, first, count, tile,
    # compile-time
    fixed: tl.constexpr, TAIL_M: tl.constexpr,
):  # fmt: skip
    """The second product of one block and one tile, with so long a tail."""
    slots_X, is_row = _rows_of(rows_ptr, first, count, 0, fixed.BLOCK_M)
    weight_X = tl.load(gates_ptr + slots_X, mask=is_row, other=0.0).to(tl.float32)
    slots_tail, is_tail, weight_tail = slots_X, is_row, weight_X
    if TAIL_M > 0:
        slots_tail, is_tail = _rows_of(rows_ptr, first, count, fixed.BLOCK_M, TAIL_M)
        weight_tail = tl.load(gates_ptr + slots_tail, mask=is_tail, other=0.0).to(tl.float32)
    down_block(
        act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr,
        expert, slots_X, weight_X, is_row, slots_tail, weight_tail, is_tail, tile, fixed,
        TAIL_M,
    )  # fmt: skip


@triton.jit(do_not_specialize=["most_blocks"])
def down_grouped(
    # pointers
    act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr, gates_ptr, rows_ptr, blocks_ptr,
    used_ptr,
    # sizes and numbers
    most_blocks,
    # compile-time
    fixed: tl.constexpr,
):  # fmt: skip
    """The second product of one block and one tile of columns."""
    used = tl.load(used_ptr)
    block, tile, part = _place(used, (fixed.D + fixed.BLOCK_N - 1) // fixed.BLOCK_N, fixed)
    if fixed.SUBBLOCKS > 1:
        expert, first, count = _subblock_of(blocks_ptr, most_blocks, block, part, fixed)
    if block >= used:
        return
    if fixed.SUBBLOCKS == 1:
        expert, first, count = _block_of(blocks_ptr, most_blocks, block)
    elif count <= 0:
        return
    if fixed.USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    TAIL_M: tl.constexpr = fixed.TAIL_M
    HALF_TAIL: tl.constexpr = TAIL_M // 2 if TAIL_M > 16 else 0
    if TAIL_M > 0 and count > fixed.BLOCK_M + HALF_TAIL:
        _down_rows(
            act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr, gates_ptr, rows_ptr,
            expert, first, count, tile, fixed, TAIL_M,
        )  # fmt: skip
        return
    if HALF_TAIL > 0 and count > fixed.BLOCK_M:
        _down_rows(
            act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr, gates_ptr, rows_ptr,
            expert, first, count, tile, fixed, HALF_TAIL,
        )  # fmt: skip
        return
    _down_rows(
        act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr, gates_ptr, rows_ptr,
        expert, first, count, tile, fixed, 0,
    )  # fmt: skip


@triton.jit
def add_slots(
    # pointers
    part_ptr, ids_ptr, out_ptr,
    # compile-time
    E: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """One token's slots, added up in one order; skipped slots are not read."""
    token = tl.program_id(0).to(tl.int64)
    k, d = tl.arange(0, SLOTS), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_used = tl.load(ids_ptr + token * K + k, mask=k < K, other=E) < E
    at = part_ptr + (token * K + k)[:, None] * D + d[None, :]
    if USE_PDL:
        gdc_wait()
    part_KJ = tl.load(at, mask=is_used[:, None] & (d < D)[None, :], other=0.0)
    total_J = tl.sum(part_KJ.to(tl.float32), axis=0)
    tl.store(out_ptr + token * D + d, total_J.to(out_ptr.dtype.element_ty), mask=d < D)
