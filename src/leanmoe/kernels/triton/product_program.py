"""The product of a block's rows and one tile of an expert's weights, in two ways of reading them.

Letters: X rows of one block (slots of one expert), J columns of one tile of the product, I columns
it is summed over.

Activations of two fp8 terms lie as two rows, one below the other, and go through a product as such:
the matrix unit has rows to spare where few tokens share an expert. They are added up at its end.
"""

# mypy: ignore-errors
# Triton's language is not Python's: names are constexprs, tensors or pointers as they are used.

from __future__ import annotations

import triton
import triton.language as tl

from leanmoe.kernels.triton.fp8_program import REST, SCALE_BLOCK


@triton.jit
def _tile_dot(w_JI, x_XI, SWAP_AB: tl.constexpr, WIDEN: tl.constexpr):
    """(X,J), or (J,X) with the weights on the left, where few rows need the wide side.

    fp8 weights become float16 where the activations are, which has all of fp8's numbers.
    """
    if WIDEN:  # the interpreter's bfloat16 products are wrong; float32 has no tf32 there
        w_JI, x_XI = w_JI.to(tl.float32), x_XI.to(tl.float32)
    elif w_JI.dtype != x_XI.dtype:
        w_JI = w_JI.to(x_XI.dtype)
    if SWAP_AB:
        product = tl.dot(w_JI, tl.trans(x_XI), input_precision="ieee")
    else:
        product = tl.dot(x_XI, tl.trans(w_JI), input_precision="ieee")
    return product


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
def _scaled(product, scale_J, scale_X, SWAP_AB: tl.constexpr):
    """The product of two fp8 tiles, in what they stand for."""
    if SWAP_AB:
        product = product * (scale_J[:, None] * scale_X[None, :])
    else:
        product = product * (scale_X[:, None] * scale_J[None, :])
    return product


@triton.jit
def _row_scales(
    scale_ptr, rows, is_row, start, WIDTH: tl.constexpr, X_BLOCK: tl.constexpr,
    FP8_TERMS: tl.constexpr,
):  # fmt: skip
    """What each row's values from `start` on are multiplied by; both terms by the same."""
    STRIDE: tl.constexpr = (WIDTH + X_BLOCK - 1) // X_BLOCK
    at = scale_ptr + rows // FP8_TERMS * STRIDE + start // X_BLOCK
    return tl.load(at, mask=is_row, other=0.0)


@triton.jit
def _term_rows(rows, is_row, FP8_TERMS: tl.constexpr):
    """Where the terms of these rows lie, and which there are."""
    if FP8_TERMS == 2:
        is_row = tl.interleave(is_row.to(tl.int8), is_row.to(tl.int8)) != 0
        rows = tl.interleave(rows * 2, rows * 2 + 1)
    return rows, is_row


@triton.jit
def _whole_rows(
    acc, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, SWAP_AB: tl.constexpr,
    FP8_TERMS: tl.constexpr,
):  # fmt: skip
    """The product of whole activations, (X,J), from that of their terms."""
    if FP8_TERMS == 2:
        if not SWAP_AB:
            acc = tl.trans(acc)
        large, rest = tl.split(tl.reshape(acc, (COLUMNS, BLOCK_M, 2)))
        product = tl.trans(large + rest * (1.0 / REST))
    elif SWAP_AB:
        product = tl.trans(acc)
    else:
        product = acc
    return product


@triton.jit
def product_of(
    # pointers, and the rows they are read at
    x_ptr, x_scale_ptr, x_rows, is_row, tail_rows, is_tail, w_ptr, columns, is_column, scale_ptr,
    # compile-time
    WIDTH: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_K: tl.constexpr, SCALED: tl.constexpr,
    SCALE_STRIDE: tl.constexpr, X_BLOCK: tl.constexpr, ALL: tl.constexpr, BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, SWAP_AB: tl.constexpr,
    FP8_TERMS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """x (X, WIDTH) times the transposed weights, float32 (X,J); and as much for the tail's rows.

    The tail shares the tile of weights: a block of 128 + 32 rows costs no second reading. It always
    has the weights on the left: the warp group's matrix unit wants 64 rows or more there.
    """
    k = tl.arange(0, BLOCK_K)
    TERM_ROWS: tl.constexpr = BLOCK_M * FP8_TERMS
    x_rows, is_row = _term_rows(x_rows, is_row, FP8_TERMS)
    x_at = x_ptr + x_rows[:, None] * WIDTH + k[None, :]
    tail_at = x_ptr + tail_rows[:, None] * WIDTH + k[None, :]
    w_at = w_ptr + columns[:, None] * STRIDE_N + k[None, :] * STRIDE_K
    TAIL_SIZE: tl.constexpr = TAIL_M if TAIL_M > 0 else 16
    acc = tl.zeros((COLUMNS, TERM_ROWS) if SWAP_AB else (TERM_ROWS, COLUMNS), dtype=tl.float32)
    tail = tl.zeros((COLUMNS, TAIL_SIZE), dtype=tl.float32)
    if SCALED:
        scale_at = scale_ptr + (columns // SCALE_BLOCK) * SCALE_STRIDE
        scale_J = tl.load(scale_at, mask=is_column, other=0.0)
        scale_X = _row_scales(x_scale_ptr, x_rows, is_row, 0, WIDTH, X_BLOCK, FP8_TERMS)
    for start in range(0, WIDTH, BLOCK_K):
        w_JI = _load_weights(w_at, is_column, start + k, WIDTH, BLOCK_K, ALL)
        x_XI = _load_tile(x_at, is_row, start + k, WIDTH, BLOCK_K)
        if SCALED:
            # The next step's scales are asked for before this step's product needs its own.
            ahead = tl.minimum(start + BLOCK_K, WIDTH - 1)
            next_scale_J = tl.load(scale_at + ahead // SCALE_BLOCK, mask=is_column, other=0.0)
            next_scale_X = _row_scales(
                x_scale_ptr, x_rows, is_row, ahead, WIDTH, X_BLOCK, FP8_TERMS
            )
            acc += _scaled(_tile_dot(w_JI, x_XI, SWAP_AB, WIDEN), scale_J, scale_X, SWAP_AB)
        else:
            acc += _tile_dot(w_JI, x_XI, SWAP_AB, WIDEN)
        if TAIL_M > 0:
            tail_XI = _load_tile(tail_at, is_tail, start + k, WIDTH, BLOCK_K)
            if SCALED:
                tail_scale = _row_scales(x_scale_ptr, tail_rows, is_tail, start, WIDTH, X_BLOCK, 1)
                tail += _scaled(_tile_dot(w_JI, tail_XI, True, WIDEN), scale_J, tail_scale, True)
            else:
                tail += _tile_dot(w_JI, tail_XI, True, WIDEN)
            tail_at += BLOCK_K
        if SCALED:
            scale_J, scale_X = next_scale_J, next_scale_X
        x_at += BLOCK_K
        w_at += BLOCK_K * STRIDE_K
    return _whole_rows(acc, BLOCK_M, COLUMNS, SWAP_AB, FP8_TERMS), tl.trans(tail)


@triton.jit
def products_by_tma(
    # pointers, and the rows they are read at
    x_ptr, x_scale_ptr, x_rows, is_row, tail_rows, is_tail, w, above, first, second, is_column,
    scale_ptr,
    # compile-time
    WIDTH: tl.constexpr, SCALED: tl.constexpr, SCALE_STRIDE: tl.constexpr, X_BLOCK: tl.constexpr,
    PAIR: tl.constexpr, BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr, SWAP_AB: tl.constexpr, FP8_TERMS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """As `product_of`, the copy engine reading the weights: `COLUMNS` rows of `w` from `first` on.

    With `PAIR` those from `second` on, too, against the same x, so that gate and up come apart.
    `above` are the rows of the experts before. Returns both products, then both of the tail's.
    """
    k, c = tl.arange(0, BLOCK_K), tl.arange(0, COLUMNS)
    TERM_ROWS: tl.constexpr = BLOCK_M * FP8_TERMS
    x_rows, is_row = _term_rows(x_rows, is_row, FP8_TERMS)
    x_at = x_ptr + x_rows[:, None] * WIDTH + k[None, :]
    tail_at = x_ptr + tail_rows[:, None] * WIDTH + k[None, :]
    TAIL_SIZE: tl.constexpr = TAIL_M if TAIL_M > 0 else 16
    one = tl.zeros((COLUMNS, TERM_ROWS) if SWAP_AB else (TERM_ROWS, COLUMNS), dtype=tl.float32)
    two = tl.zeros((COLUMNS, TERM_ROWS) if SWAP_AB else (TERM_ROWS, COLUMNS), dtype=tl.float32)
    one_tail = tl.zeros((COLUMNS, TAIL_SIZE), dtype=tl.float32)
    two_tail = tl.zeros((COLUMNS, TAIL_SIZE), dtype=tl.float32)
    one_at = scale_ptr + (first + c) // SCALE_BLOCK * SCALE_STRIDE
    two_at = scale_ptr + (second + c) // SCALE_BLOCK * SCALE_STRIDE
    for start in range(0, WIDTH, BLOCK_K):
        x_XI = _load_tile(x_at, is_row, start + k, WIDTH, BLOCK_K)
        one_JI = w.load([above + first, start])
        if PAIR:
            two_JI = w.load([above + second, start])
        if TAIL_M > 0:
            tail_XI = _load_tile(tail_at, is_tail, start + k, WIDTH, BLOCK_K)
        if SCALED:
            scale_X = _row_scales(x_scale_ptr, x_rows, is_row, start, WIDTH, X_BLOCK, FP8_TERMS)
            one_J = tl.load(one_at + start // SCALE_BLOCK, mask=is_column, other=0.0)
            one += _scaled(_tile_dot(one_JI, x_XI, SWAP_AB, WIDEN), one_J, scale_X, SWAP_AB)
            if PAIR:
                two_J = tl.load(two_at + start // SCALE_BLOCK, mask=is_column, other=0.0)
                two += _scaled(_tile_dot(two_JI, x_XI, SWAP_AB, WIDEN), two_J, scale_X, SWAP_AB)
            if TAIL_M > 0:
                tail_X = _row_scales(x_scale_ptr, tail_rows, is_tail, start, WIDTH, X_BLOCK, 1)
                one_tail += _scaled(_tile_dot(one_JI, tail_XI, True, WIDEN), one_J, tail_X, True)
                if PAIR:
                    product = _tile_dot(two_JI, tail_XI, True, WIDEN)
                    two_tail += _scaled(product, two_J, tail_X, True)
        else:
            one += _tile_dot(one_JI, x_XI, SWAP_AB, WIDEN)
            if PAIR:
                two += _tile_dot(two_JI, x_XI, SWAP_AB, WIDEN)
            if TAIL_M > 0:
                one_tail += _tile_dot(one_JI, tail_XI, True, WIDEN)
                if PAIR:
                    two_tail += _tile_dot(two_JI, tail_XI, True, WIDEN)
        x_at += BLOCK_K
        tail_at += BLOCK_K
    one = _whole_rows(one, BLOCK_M, COLUMNS, SWAP_AB, FP8_TERMS)
    two = _whole_rows(two, BLOCK_M, COLUMNS, SWAP_AB, FP8_TERMS)
    return one, two, tl.trans(one_tail), tl.trans(two_tail)
