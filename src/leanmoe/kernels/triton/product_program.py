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


class Fixed(dict):
    """What is fixed when a product's programs compile, by name: sizes, strides, tiles and options.

    A dict, so that Triton's hooks can write it as JSON; in a program each value is a constexpr.
    """

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return tl.constexpr(self[name])

    def __hash__(self):
        return hash(tuple(self.items()))


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
def _added(
    acc, w_JI, x_XI, scale_J, scale_X, fixed: tl.constexpr, SWAP_AB: tl.constexpr
):  # fmt: skip
    """The sums with the product of two tiles, of fp8 ones in what they stand for."""
    product = _tile_dot(w_JI, x_XI, SWAP_AB, fixed.WIDEN)
    if fixed.SCALED and SWAP_AB:
        product = product * (scale_J[:, None] * scale_X[None, :])
    elif fixed.SCALED:
        product = product * (scale_X[:, None] * scale_J[None, :])
    return acc + product


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
    scale_ptr, rows, is_row, start, fixed: tl.constexpr, WIDTH: tl.constexpr,
    FP8_TERMS: tl.constexpr,
):  # fmt: skip
    """What each row's values from `start` on are multiplied by; both terms by the same."""
    STRIDE: tl.constexpr = (WIDTH + fixed.X_BLOCK - 1) // fixed.X_BLOCK
    at = scale_ptr + rows // FP8_TERMS * STRIDE + start // fixed.X_BLOCK
    return tl.load(at, mask=is_row, other=0.0)


@triton.jit
def _term_rows(rows, is_row, FP8_TERMS: tl.constexpr):
    """Where the terms of these rows lie, and which there are."""
    if FP8_TERMS == 2:
        is_row = tl.interleave(is_row.to(tl.int8), is_row.to(tl.int8)) != 0
        rows = tl.interleave(rows * 2, rows * 2 + 1)
    return rows, is_row


@triton.jit
def _whole_rows(acc, fixed: tl.constexpr, COLUMNS: tl.constexpr):
    """The product of whole activations, (X,J), from that of their terms."""
    if fixed.FP8_TERMS == 2:
        if not fixed.SWAP_AB:
            acc = tl.trans(acc)
        large, rest = tl.split(tl.reshape(acc, (COLUMNS, fixed.BLOCK_M, 2)))
        product = tl.trans(large + rest * (1.0 / REST))
    elif fixed.SWAP_AB:
        product = tl.trans(acc)
    else:
        product = acc
    return product


@triton.jit
def _no_sums(fixed: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros to add products to."""
    ROWS: tl.constexpr = fixed.BLOCK_M * fixed.FP8_TERMS
    return tl.zeros((COLUMNS, ROWS) if fixed.SWAP_AB else (ROWS, COLUMNS), dtype=tl.float32)


@triton.jit
def product_of(
    # pointers, and the rows they are read at
    x_ptr, x_scale_ptr, x_rows, is_row, tail_rows, is_tail, w_ptr, columns, is_column, scale_ptr,
    # compile-time
    fixed: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ALL: tl.constexpr,
    TAIL_M: tl.constexpr,
):  # fmt: skip
    """x (X, WIDTH) times the transposed weights, float32 (X,J); and as much for the tail's rows.

    The tail shares the tile of weights: a block of 128 + 32 rows costs no second reading. It always
    has the weights on the left: the warp group's matrix unit wants 64 rows or more there.
    """
    BLOCK_K: tl.constexpr = fixed.BLOCK_K
    TERMS: tl.constexpr = fixed.FP8_TERMS
    k = tl.arange(0, BLOCK_K)
    x_rows, is_row = _term_rows(x_rows, is_row, TERMS)
    x_at = x_ptr + x_rows[:, None] * WIDTH + k[None, :]
    tail_at = x_ptr + tail_rows[:, None] * WIDTH + k[None, :]
    w_at = w_ptr + columns[:, None] * fixed.STRIDE_N + k[None, :] * fixed.STRIDE_K
    acc = _no_sums(fixed, COLUMNS)
    tail = tl.zeros((COLUMNS, TAIL_M if TAIL_M > 0 else 16), dtype=tl.float32)
    scale_J, scale_X = None, None
    if fixed.SCALED:
        scale_at = scale_ptr + (columns // SCALE_BLOCK) * ((WIDTH + 127) // 128)
        scale_J = tl.load(scale_at, mask=is_column, other=0.0)
        scale_X = _row_scales(x_scale_ptr, x_rows, is_row, 0, fixed, WIDTH, TERMS)
    for start in range(0, WIDTH, BLOCK_K):
        w_JI = _load_weights(w_at, is_column, start + k, WIDTH, BLOCK_K, ALL)
        x_XI = _load_tile(x_at, is_row, start + k, WIDTH, BLOCK_K)
        if fixed.SCALED:
            # The next step's scales are asked for before this step's product needs its own.
            ahead = tl.minimum(start + BLOCK_K, WIDTH - 1)
            next_J = tl.load(scale_at + ahead // SCALE_BLOCK, mask=is_column, other=0.0)
            next_X = _row_scales(x_scale_ptr, x_rows, is_row, ahead, fixed, WIDTH, TERMS)
        acc = _added(acc, w_JI, x_XI, scale_J, scale_X, fixed, fixed.SWAP_AB)
        if TAIL_M > 0:
            tail_XI = _load_tile(tail_at, is_tail, start + k, WIDTH, BLOCK_K)
            tail_X = None
            if fixed.SCALED:
                tail_X = _row_scales(x_scale_ptr, tail_rows, is_tail, start, fixed, WIDTH, 1)
            tail = _added(tail, w_JI, tail_XI, scale_J, tail_X, fixed, True)
            tail_at += BLOCK_K
        if fixed.SCALED:
            scale_J, scale_X = next_J, next_X
        x_at += BLOCK_K
        w_at += BLOCK_K * fixed.STRIDE_K
    return _whole_rows(acc, fixed, COLUMNS), tl.trans(tail)


@triton.jit
def products_by_tma(
    # pointers, and the rows they are read at
    x_ptr, x_scale_ptr, x_rows, is_row, tail_rows, is_tail, w, above, first, second, is_column,
    scale_ptr,
    # compile-time
    fixed: tl.constexpr, WIDTH: tl.constexpr, TAIL_M: tl.constexpr,
):  # fmt: skip
    """As `product_of`, the copy engine reading the weights: `BLOCK_N` rows of `w` from `first` on.

    With a gate those from `second` on, too, against the same x, so that gate and up come apart.
    `above` are the rows of the experts before. Returns both products, then both of the tail's.
    """
    BLOCK_K: tl.constexpr = fixed.BLOCK_K
    COLUMNS: tl.constexpr = fixed.BLOCK_N
    TERMS: tl.constexpr = fixed.FP8_TERMS
    TAIL_SIZE: tl.constexpr = TAIL_M if TAIL_M > 0 else 16
    k, c = tl.arange(0, BLOCK_K), tl.arange(0, COLUMNS)
    x_rows, is_row = _term_rows(x_rows, is_row, TERMS)
    x_at = x_ptr + x_rows[:, None] * WIDTH + k[None, :]
    tail_at = x_ptr + tail_rows[:, None] * WIDTH + k[None, :]
    one, two = _no_sums(fixed, COLUMNS), _no_sums(fixed, COLUMNS)
    one_tail = tl.zeros((COLUMNS, TAIL_SIZE), dtype=tl.float32)
    two_tail = tl.zeros((COLUMNS, TAIL_SIZE), dtype=tl.float32)
    one_at = scale_ptr + (first + c) // SCALE_BLOCK * ((WIDTH + 127) // 128)
    two_at = scale_ptr + (second + c) // SCALE_BLOCK * ((WIDTH + 127) // 128)
    for start in range(0, WIDTH, BLOCK_K):
        x_XI = _load_tile(x_at, is_row, start + k, WIDTH, BLOCK_K)
        one_JI = w.load([above + first, start])
        if fixed.GATED:
            two_JI = w.load([above + second, start])
        if TAIL_M > 0:
            tail_XI = _load_tile(tail_at, is_tail, start + k, WIDTH, BLOCK_K)
        one_J, two_J, scale_X, tail_X = None, None, None, None
        if fixed.SCALED:
            scale_X = _row_scales(x_scale_ptr, x_rows, is_row, start, fixed, WIDTH, TERMS)
            one_J = tl.load(one_at + start // SCALE_BLOCK, mask=is_column, other=0.0)
        one = _added(one, one_JI, x_XI, one_J, scale_X, fixed, fixed.SWAP_AB)
        if fixed.GATED:
            if fixed.SCALED:
                two_J = tl.load(two_at + start // SCALE_BLOCK, mask=is_column, other=0.0)
            two = _added(two, two_JI, x_XI, two_J, scale_X, fixed, fixed.SWAP_AB)
        if TAIL_M > 0:
            if fixed.SCALED:
                tail_X = _row_scales(x_scale_ptr, tail_rows, is_tail, start, fixed, WIDTH, 1)
            one_tail = _added(one_tail, one_JI, tail_XI, one_J, tail_X, fixed, True)
            if fixed.GATED:
                two_tail = _added(two_tail, two_JI, tail_XI, two_J, tail_X, fixed, True)
        x_at += BLOCK_K
        tail_at += BLOCK_K
    one, two = _whole_rows(one, fixed, COLUMNS), _whole_rows(two, fixed, COLUMNS)
    return one, two, tl.trans(one_tail), tl.trans(two_tail)
