"""The experts over a work list: first product, second product, sum over each token's slots.

Letters: T tokens, K slots a token, N = T*K slots, E experts, D hidden width, M expert width,
R rows of one block, C columns of one tile.
"""

# mypy: ignore-errors
# Triton's language is not Python's: names are constexprs, tensors or pointers as they are used.

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from leanmoe.kernels.triton.tile_program import down_block, gate_up_block


@triton.jit
def _rows_of(rows_ptr, first, count, skip, ROWS: tl.constexpr):
    """Slot numbers of a block's rows from `skip` on, and which of them there are."""
    r = skip + tl.arange(0, ROWS)
    is_row = r < count
    return tl.load(rows_ptr + first + r, mask=is_row, other=0), is_row


@triton.jit
def _place(used, TILES, GROUP: tl.constexpr, PIECES: tl.constexpr):
    """Block, tile and piece of this program.

    The pieces of a block run side by side at each tile of columns, and so do `GROUP` blocks: they
    find its weights in L2.
    """
    pid, piece = tl.program_id(0) // PIECES, tl.program_id(0) % PIECES
    if GROUP == 1:
        block, tile = pid // TILES, pid % TILES
    else:
        group = pid // (GROUP * TILES)
        height = tl.minimum(used - group * GROUP, GROUP)
        inside = pid - group * GROUP * TILES
        if inside < height * TILES:
            block, tile = group * GROUP + inside % height, inside // height
        else:  # the last group has fewer blocks than programs for them
            block, tile = used, 0
    return block, tile, piece


@triton.jit
def _block_of(blocks_ptr, most_blocks, block):
    """Expert, first place in `rows` and number of rows of a block."""
    expert = tl.load(blocks_ptr + block)
    first = tl.load(blocks_ptr + most_blocks + block)
    return expert, first, tl.load(blocks_ptr + 2 * most_blocks + block)


@triton.jit
def _piece_of(blocks_ptr, most_blocks, block, piece, ROWS: tl.constexpr, TAIL: tl.constexpr):
    """Expert, first place in `rows` and number of rows of a block's piece.

    All but the last have `ROWS`; it may have a tail, and those after it have no row. Read before
    it is known whether there is such a block, so that one need not wait for the other.
    """
    is_inside = block < most_blocks
    expert = tl.load(blocks_ptr + block, mask=is_inside, other=0)
    first = tl.load(blocks_ptr + most_blocks + block, mask=is_inside, other=0)
    count = tl.load(blocks_ptr + 2 * most_blocks + block, mask=is_inside, other=0)
    last = tl.maximum((count - TAIL + ROWS - 1) // ROWS, 1) - 1
    count = tl.where(piece < last, ROWS, tl.where(piece == last, count - last * ROWS, 0))
    return expert, first + piece * ROWS, count


@triton.jit
def _gate_up_rows(
    x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr, rows_ptr,
    expert, first, count, tile, limit, alpha, up_offset,
    K: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    STRIDE_C: tl.constexpr, STRIDE_K: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LIMIT: tl.constexpr,
    ACTIVATION: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    DESCRIBED: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The first product of one block and one tile, with so long a tail."""
    slots_R, is_row = _rows_of(rows_ptr, first, count, 0, ROWS)
    slots_tail, is_tail = slots_R, is_row
    if TAIL > 0:
        slots_tail, is_tail = _rows_of(rows_ptr, first, count, ROWS, TAIL)
    gate_up_block(
        x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr,
        expert, (slots_R // K).to(tl.int64), slots_R, is_row,
        (slots_tail // K).to(tl.int64), slots_tail, is_tail,
        tile, limit, alpha, up_offset,
        D, M, STRIDE_C, STRIDE_K, GATED, INTERLEAVED, HAS_BIAS, HAS_LIMIT, ACTIVATION,
        SCALED, ROWS, TAIL, BLOCK_C, BLOCK_K, SWAP, DESCRIBED, PARTS, WIDEN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["most_blocks"])
def gate_up_listed(
    x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr,
    rows_ptr, blocks_ptr, used_ptr,
    most_blocks, limit, alpha, up_offset,
    K: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    STRIDE_C: tl.constexpr, STRIDE_K: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LIMIT: tl.constexpr,
    ACTIVATION: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr,
    PIECES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SWAP: tl.constexpr, DESCRIBED: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The first product of one block of the work list and one tile of columns."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # not before: whoever comes next relies on what was waited for
    used = tl.load(used_ptr)
    block, tile, piece = _place(used, (M + BLOCK_C - 1) // BLOCK_C, GROUP, PIECES)
    if PIECES > 1:
        expert, first, count = _piece_of(blocks_ptr, most_blocks, block, piece, ROWS, TAIL)
    if block >= used:
        return
    if PIECES == 1:
        expert, first, count = _block_of(blocks_ptr, most_blocks, block)
    elif count <= 0:
        return
    HALF: tl.constexpr = TAIL // 2 if TAIL > 16 else 0
    if TAIL > 0 and count > ROWS + HALF:
        _gate_up_rows(
            x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr, rows_ptr,
            expert, first, count, tile, limit, alpha, up_offset,
            K, D, M, STRIDE_C, STRIDE_K, GATED, INTERLEAVED, HAS_BIAS, HAS_LIMIT, ACTIVATION,
            SCALED, ROWS, TAIL, BLOCK_C, BLOCK_K, SWAP, DESCRIBED, PARTS, WIDEN,
        )  # fmt: skip
        return
    if HALF > 0 and count > ROWS:
        _gate_up_rows(
            x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr, rows_ptr,
            expert, first, count, tile, limit, alpha, up_offset,
            K, D, M, STRIDE_C, STRIDE_K, GATED, INTERLEAVED, HAS_BIAS, HAS_LIMIT, ACTIVATION,
            SCALED, ROWS, HALF, BLOCK_C, BLOCK_K, SWAP, DESCRIBED, PARTS, WIDEN,
        )  # fmt: skip
        return
    _gate_up_rows(
        x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr, rows_ptr,
        expert, first, count, tile, limit, alpha, up_offset,
        K, D, M, STRIDE_C, STRIDE_K, GATED, INTERLEAVED, HAS_BIAS, HAS_LIMIT, ACTIVATION,
        SCALED, ROWS, 0, BLOCK_C, BLOCK_K, SWAP, DESCRIBED, PARTS, WIDEN,
    )  # fmt: skip


@triton.jit
def _down_rows(
    act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr, gates_ptr, rows_ptr,
    expert, first, count, tile,
    D: tl.constexpr, M: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, X_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    DESCRIBED: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The second product of one block and one tile, with so long a tail."""
    slots_R, is_row = _rows_of(rows_ptr, first, count, 0, ROWS)
    weight_R = tl.load(gates_ptr + slots_R, mask=is_row, other=0.0).to(tl.float32)
    slots_tail, is_tail, weight_tail = slots_R, is_row, weight_R
    if TAIL > 0:
        slots_tail, is_tail = _rows_of(rows_ptr, first, count, ROWS, TAIL)
        weight_tail = tl.load(gates_ptr + slots_tail, mask=is_tail, other=0.0).to(tl.float32)
    down_block(
        act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr,
        expert, slots_R, weight_R, is_row, slots_tail, weight_tail, is_tail, tile,
        D, M, STRIDE_C, STRIDE_K, HAS_BIAS, SCALED, X_BLOCK, ROWS, TAIL, BLOCK_C, BLOCK_K, SWAP,
        DESCRIBED, PARTS, WIDEN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["most_blocks"])
def down_listed(
    act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr, gates_ptr,
    rows_ptr, blocks_ptr, used_ptr,
    most_blocks,
    D: tl.constexpr, M: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, X_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, TAIL: tl.constexpr,
    PIECES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SWAP: tl.constexpr, DESCRIBED: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The second product of one block of the work list and one tile of columns."""
    used = tl.load(used_ptr)
    block, tile, piece = _place(used, (D + BLOCK_C - 1) // BLOCK_C, GROUP, PIECES)
    if PIECES > 1:
        expert, first, count = _piece_of(blocks_ptr, most_blocks, block, piece, ROWS, TAIL)
    if block >= used:
        return
    if PIECES == 1:
        expert, first, count = _block_of(blocks_ptr, most_blocks, block)
    elif count <= 0:
        return
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    HALF: tl.constexpr = TAIL // 2 if TAIL > 16 else 0
    if TAIL > 0 and count > ROWS + HALF:
        _down_rows(
            act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr, gates_ptr, rows_ptr,
            expert, first, count, tile,
            D, M, STRIDE_C, STRIDE_K, HAS_BIAS, SCALED, X_BLOCK, ROWS, TAIL, BLOCK_C, BLOCK_K, SWAP,
            DESCRIBED, PARTS, WIDEN,
        )  # fmt: skip
        return
    if HALF > 0 and count > ROWS:
        _down_rows(
            act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr, gates_ptr, rows_ptr,
            expert, first, count, tile,
            D, M, STRIDE_C, STRIDE_K, HAS_BIAS, SCALED, X_BLOCK, ROWS, HALF, BLOCK_C, BLOCK_K, SWAP,
            DESCRIBED, PARTS, WIDEN,
        )  # fmt: skip
        return
    _down_rows(
        act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr, gates_ptr, rows_ptr,
        expert, first, count, tile,
        D, M, STRIDE_C, STRIDE_K, HAS_BIAS, SCALED, X_BLOCK, ROWS, 0, BLOCK_C, BLOCK_K, SWAP,
        DESCRIBED, PARTS, WIDEN,
    )  # fmt: skip


@triton.jit
def add_slots(
    part_ptr, ids_ptr, out_ptr,
    E: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr,
    BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token's slots, added up in one order; skipped slots are not read."""
    token = tl.program_id(0).to(tl.int64)
    k, d = tl.arange(0, SLOTS), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_used = tl.load(ids_ptr + token * K + k, mask=k < K, other=E) < E
    at = part_ptr + (token * K + k)[:, None] * D + d[None, :]
    if PDL:
        gdc_wait()
    part_KC = tl.load(at, mask=is_used[:, None] & (d < D)[None, :], other=0.0)
    total_C = tl.sum(part_KC.to(tl.float32), axis=0)
    tl.store(out_ptr + token * D + d, total_C.to(out_ptr.dtype.element_ty), mask=d < D)
