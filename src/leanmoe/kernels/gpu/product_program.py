"""A tile of token rows times a tile of one expert's weights: the loops of both products.

Letters: R rows of one block, C columns of one tile, K columns of the operands read in one step.

Weights in fp8 have a scale for each 128 x 128 block, activations one for each row and 128 columns:
each step's product is scaled and added up in float32.

Activations of two fp8 parts lie as two rows, one below the other. Where the weights are on the left
they go through a product as such, side by side, and are added up at its end: the matrix unit has
rows to spare where few tokens share an expert. With the weights on the right, where rows are many,
one part follows the other into the same sum: no more registers, and a tile of weights serves both.
"""

# mypy: ignore-errors
# Triton's language is not Python's: names are constexprs, tensors or pointers as they are used.

from __future__ import annotations

import triton
import triton.language as tl

SCALE_BLOCK = tl.constexpr(128)
"""fp8 weights have one scale for so many rows and columns (DeepSeek-V3 report, section 3.3.2)."""
REST = tl.constexpr(16.0)
"""What rounding to fp8 e4m3 takes away is no more than a sixteenth of the number."""


@triton.jit
def _tile_dot(w_CK, x_RK, SWAP: tl.constexpr, WIDEN: tl.constexpr):
    """(R,C), or (C,R) with the weights on the left, where few rows need the wide side."""
    if WIDEN:  # the interpreter's bfloat16 products are wrong; float32 has no tf32 there
        w_CK, x_RK = w_CK.to(tl.float32), x_RK.to(tl.float32)
    if SWAP:
        found = tl.dot(w_CK, tl.trans(x_RK), input_precision="ieee")
    else:
        found = tl.dot(x_RK, tl.trans(w_CK), input_precision="ieee")
    return found


@triton.jit
def _scaled_dot(
    w_CK, x_RK, rest_RK, scale_C, scale_R,
    SWAP: tl.constexpr, IS_SPLIT: tl.constexpr, ONE_SCALE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The product of two fp8 tiles, in what they stand for; `rest_RK` is x's other part.

    With `ONE_SCALE` all columns have one, `scale_C` is a number, and each row is scaled once.
    """
    if IS_SPLIT:
        found = _tile_dot(w_CK, rest_RK, SWAP, WIDEN) * (1.0 / REST)
        if WIDEN:
            found += _tile_dot(w_CK, x_RK, SWAP, WIDEN)
        elif SWAP:
            found = tl.dot(w_CK, tl.trans(x_RK), found)
        else:
            found = tl.dot(x_RK, tl.trans(w_CK), found)
    else:
        found = _tile_dot(w_CK, x_RK, SWAP, WIDEN)
    if ONE_SCALE:
        both_R = scale_R * scale_C
        scale = both_R[None, :] if SWAP else both_R[:, None]
    elif SWAP:
        scale = scale_C[:, None] * scale_R[None, :]
    else:
        scale = scale_R[:, None] * scale_C[None, :]
    return found * scale


@triton.jit
def _load_tile(pointers, is_row, column_k, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    if WIDTH % BLOCK_K == 0:
        tile = tl.load(pointers, mask=is_row[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=is_row[:, None] & (column_k < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def _load_weights(
    pointers, is_column, column_k, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, ALL: tl.constexpr
):
    if ALL and WIDTH % BLOCK_K == 0:
        tile = tl.load(pointers, eviction_policy="evict_first")
    elif ALL:
        tile = tl.load(pointers, mask=(column_k < WIDTH)[None, :], other=0.0)
    else:
        inside = is_column[:, None] & (column_k < WIDTH)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def _row_scales(
    scale_ptr, rows, is_row, start, WIDTH: tl.constexpr, X_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """What each row's values from `start` on are multiplied by; both parts by the same."""
    STRIDE: tl.constexpr = (WIDTH + X_BLOCK - 1) // X_BLOCK
    at = scale_ptr + (rows.to(tl.int32) // PARTS * STRIDE + start // X_BLOCK)
    return tl.load(at, mask=is_row, other=0.0)


@triton.jit
def _part_rows(rows, is_row, PARTS: tl.constexpr, SWAP: tl.constexpr):
    """Where these rows lie: side by side both parts, or the first, and which there are."""
    if PARTS == 2 and SWAP:
        is_row = tl.interleave(is_row.to(tl.int8), is_row.to(tl.int8)) != 0
        rows = tl.interleave(rows * 2, rows * 2 + 1)
    elif PARTS == 2:
        rows = rows * 2
    return rows, is_row


@triton.jit
def _whole_rows(
    acc, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SWAP: tl.constexpr, PARTS: tl.constexpr
):
    """The product of whole activations, (R,C), from that of parts that lay side by side."""
    if PARTS == 2 and SWAP:
        large, rest = tl.split(tl.reshape(acc, (COLUMNS, ROWS, 2)))
        found = tl.trans(large + rest * (1.0 / REST))
    elif SWAP:
        found = tl.trans(acc)
    else:
        found = acc
    return found


@triton.jit
def pointed_product(
    x_ptr, x_scale_ptr, x_rows, is_row, tail_rows, is_tail,
    w_ptr, columns, is_column, scale_ptr,
    WIDTH: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_K: tl.constexpr,
    SCALED: tl.constexpr, SCALE_STRIDE: tl.constexpr, X_BLOCK: tl.constexpr, ALL: tl.constexpr,
    ROWS: tl.constexpr, TAIL: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """x (R, WIDTH) times the transposed weights, float32 (R,C); and as much for the tail's rows.

    The tail shares the tile of weights: a block of 128 + 32 rows costs no second reading. It always
    has the weights on the left: the warp group's matrix unit wants 64 rows or more there.
    """
    IS_SPLIT: tl.constexpr = PARTS == 2 and not SWAP
    k = tl.arange(0, BLOCK_K)
    PART_ROWS: tl.constexpr = ROWS * PARTS if SWAP else ROWS
    x_rows, is_row = _part_rows(x_rows, is_row, PARTS, SWAP)
    tail_rows, is_tail = _part_rows(tail_rows, is_tail, PARTS, False)
    x_at = x_ptr + x_rows[:, None] * WIDTH + k[None, :]
    tail_at = x_ptr + tail_rows[:, None] * WIDTH + k[None, :]
    w_at = w_ptr + columns[:, None] * STRIDE_C + k[None, :] * STRIDE_K
    TAIL_SIZE: tl.constexpr = TAIL if TAIL > 0 else 16
    acc = tl.zeros((COLUMNS, PART_ROWS) if SWAP else (PART_ROWS, COLUMNS), dtype=tl.float32)
    tail = tl.zeros((COLUMNS, TAIL_SIZE), dtype=tl.float32)
    if SCALED:
        scale_at = scale_ptr + (columns // SCALE_BLOCK) * SCALE_STRIDE
        scale_C = tl.load(scale_at, mask=is_column, other=0.0)
        scale_R = _row_scales(x_scale_ptr, x_rows, is_row, 0, WIDTH, X_BLOCK, PARTS)
    for start in range(0, WIDTH, BLOCK_K):
        w_CK = _load_weights(w_at, is_column, start + k, WIDTH, BLOCK_K, ALL)
        x_RK = _load_tile(x_at, is_row, start + k, WIDTH, BLOCK_K)
        rest_RK = x_RK
        if IS_SPLIT:
            rest_RK = _load_tile(x_at + WIDTH, is_row, start + k, WIDTH, BLOCK_K)
        if SCALED:
            # The next step's scales are asked for before this step's product needs its own.
            ahead = tl.minimum(start + BLOCK_K, WIDTH - 1)
            next_scale_C = tl.load(scale_at + ahead // SCALE_BLOCK, mask=is_column, other=0.0)
            next_scale_R = _row_scales(x_scale_ptr, x_rows, is_row, ahead, WIDTH, X_BLOCK, PARTS)
            acc += _scaled_dot(w_CK, x_RK, rest_RK, scale_C, scale_R, SWAP, IS_SPLIT, False, WIDEN)
        else:
            acc += _tile_dot(w_CK, x_RK, SWAP, WIDEN)
        if TAIL > 0:
            tail_RK = _load_tile(tail_at, is_tail, start + k, WIDTH, BLOCK_K)
            rest_tail_RK = tail_RK
            if IS_SPLIT:
                rest_tail_RK = _load_tile(tail_at + WIDTH, is_tail, start + k, WIDTH, BLOCK_K)
            if SCALED:
                scale = _row_scales(x_scale_ptr, tail_rows, is_tail, start, WIDTH, X_BLOCK, PARTS)
                tail += _scaled_dot(
                    w_CK, tail_RK, rest_tail_RK, scale_C, scale, True, IS_SPLIT, False, WIDEN
                )
            else:
                tail += _tile_dot(w_CK, tail_RK, True, WIDEN)
            tail_at += BLOCK_K
        if SCALED:
            scale_C, scale_R = next_scale_C, next_scale_R
        x_at += BLOCK_K
        w_at += BLOCK_K * STRIDE_K
    return _whole_rows(acc, ROWS, COLUMNS, SWAP, PARTS), tl.trans(tail)


@triton.jit
def described_product(
    x_ptr, x_scale_ptr, x_rows, is_row, tail_rows, is_tail,
    w, above, first, second, is_column, scale_ptr,
    WIDTH: tl.constexpr, SCALED: tl.constexpr, SCALE_STRIDE: tl.constexpr,
    X_BLOCK: tl.constexpr, ONE_SCALE: tl.constexpr, PAIR: tl.constexpr,
    ROWS: tl.constexpr, TAIL: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """As `pointed_product`, the copy engine reading the weights: rows of `w` from `first` on.

    With `PAIR` those from `second` on, too, against the same x, so that gate and up come apart.
    `above` are the rows of the experts before; `ONE_SCALE` says that `COLUMNS` of the tile, gate or
    up, have one scale. Returns both products, then both of the tail's.
    """
    IS_SPLIT: tl.constexpr = PARTS == 2 and not SWAP
    k, c = tl.arange(0, BLOCK_K), tl.arange(0, COLUMNS)
    PART_ROWS: tl.constexpr = ROWS * PARTS if SWAP else ROWS
    x_rows, is_row = _part_rows(x_rows, is_row, PARTS, SWAP)
    tail_rows, is_tail = _part_rows(tail_rows, is_tail, PARTS, False)
    x_at = x_ptr + x_rows[:, None] * WIDTH + k[None, :]
    tail_at = x_ptr + tail_rows[:, None] * WIDTH + k[None, :]
    TAIL_SIZE: tl.constexpr = TAIL if TAIL > 0 else 16
    one = tl.zeros((COLUMNS, PART_ROWS) if SWAP else (PART_ROWS, COLUMNS), dtype=tl.float32)
    two = tl.zeros((COLUMNS, PART_ROWS) if SWAP else (PART_ROWS, COLUMNS), dtype=tl.float32)
    one_tail = tl.zeros((COLUMNS, TAIL_SIZE), dtype=tl.float32)
    two_tail = tl.zeros((COLUMNS, TAIL_SIZE), dtype=tl.float32)
    one_at, two_at, is_scale = scale_ptr, scale_ptr, True
    if ONE_SCALE:
        one_at += first // SCALE_BLOCK * SCALE_STRIDE
        two_at += second // SCALE_BLOCK * SCALE_STRIDE
    else:
        one_at += (first + c) // SCALE_BLOCK * SCALE_STRIDE
        two_at += (second + c) // SCALE_BLOCK * SCALE_STRIDE
        is_scale = is_column
    for start in range(0, WIDTH, BLOCK_K):
        x_RK = _load_tile(x_at, is_row, start + k, WIDTH, BLOCK_K)
        rest_RK = x_RK
        if IS_SPLIT:
            rest_RK = _load_tile(x_at + WIDTH, is_row, start + k, WIDTH, BLOCK_K)
        one_CK = w.load([above + first, start])
        if PAIR:
            two_CK = w.load([above + second, start])
        if TAIL > 0:
            tail_RK = _load_tile(tail_at, is_tail, start + k, WIDTH, BLOCK_K)
            rest_tail_RK = tail_RK
            if IS_SPLIT:
                rest_tail_RK = _load_tile(tail_at + WIDTH, is_tail, start + k, WIDTH, BLOCK_K)
        if SCALED:
            scale_R = _row_scales(x_scale_ptr, x_rows, is_row, start, WIDTH, X_BLOCK, PARTS)
            one_C = tl.load(one_at + start // SCALE_BLOCK, mask=is_scale, other=0.0)
            if PAIR:
                two_C = tl.load(two_at + start // SCALE_BLOCK, mask=is_scale, other=0.0)
            if TAIL > 0:
                tail_R = _row_scales(x_scale_ptr, tail_rows, is_tail, start, WIDTH, X_BLOCK, PARTS)
            one += _scaled_dot(
                one_CK, x_RK, rest_RK, one_C, scale_R, SWAP, IS_SPLIT, ONE_SCALE, WIDEN
            )
            if PAIR:
                two += _scaled_dot(
                    two_CK, x_RK, rest_RK, two_C, scale_R, SWAP, IS_SPLIT, ONE_SCALE, WIDEN
                )
            if TAIL > 0:
                one_tail += _scaled_dot(
                    one_CK, tail_RK, rest_tail_RK, one_C, tail_R, True, IS_SPLIT, ONE_SCALE, WIDEN
                )
            if TAIL > 0 and PAIR:
                two_tail += _scaled_dot(
                    two_CK, tail_RK, rest_tail_RK, two_C, tail_R, True, IS_SPLIT, ONE_SCALE, WIDEN
                )
        else:
            one += _tile_dot(one_CK, x_RK, SWAP, WIDEN)
            if PAIR:
                two += _tile_dot(two_CK, x_RK, SWAP, WIDEN)
            if TAIL > 0:
                one_tail += _tile_dot(one_CK, tail_RK, True, WIDEN)
                if PAIR:
                    two_tail += _tile_dot(two_CK, tail_RK, True, WIDEN)
        x_at += BLOCK_K
        tail_at += BLOCK_K
    one = _whole_rows(one, ROWS, COLUMNS, SWAP, PARTS)
    two = _whole_rows(two, ROWS, COLUMNS, SWAP, PARTS)
    return one, two, tl.trans(one_tail), tl.trans(two_tail)
