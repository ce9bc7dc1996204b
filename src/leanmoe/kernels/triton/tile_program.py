"""One tile of the experts' two products: what every way of running them is made of.

Letters: T tokens, K slots a token, N = T*K slots, E experts, D hidden width, M expert width,
R rows of one block, C columns of one tile.

The first product reads a block's token rows and writes activation(gate) * up to `act_NM`, one row
a slot. The second multiplies these, adds the bias, weighs and writes `part_ND`.

Activations of two fp8 parts lie as two rows, one below the other, and go through a product as such:
the matrix unit has rows to spare where few tokens share an expert. They are added up at its end.
"""

# mypy: ignore-errors
# Triton's language is not Python's: names are constexprs, tensors or pointers as they are used.

from __future__ import annotations

import triton
import triton.language as tl

from leanmoe.kernels.triton.fp8_program import REST, SCALE_BLOCK, rest_fp8, to_coded

SILU, GELU, GELU_TANH, RELU, RELU2 = (tl.constexpr(i) for i in range(5))
"""Numbers of the activations, in the order of `kernels.weights.ACTIVATIONS`."""


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr, alpha):
    if ACTIVATION == SILU:
        y = x * tl.sigmoid(alpha * x)
    elif ACTIVATION == GELU:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        # 0.5 x (1 + tanh z) is x sigmoid(2 z)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == RELU:
        y = tl.maximum(x, 0.0)
    else:
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return y


@triton.jit
def _tile_dot(w_CK, x_RK, SWAP: tl.constexpr, WIDEN: tl.constexpr):
    """(R,C), or (C,R) with the weights on the left, where few rows need the wide side.

    fp8 weights become float16 where the activations are, which has all of fp8's numbers.
    """
    if WIDEN:  # the interpreter's bfloat16 products are wrong; float32 has no tf32 there
        w_CK, x_RK = w_CK.to(tl.float32), x_RK.to(tl.float32)
    elif w_CK.dtype != x_RK.dtype:
        w_CK = w_CK.to(x_RK.dtype)
    if SWAP:
        found = tl.dot(w_CK, tl.trans(x_RK), input_precision="ieee")
    else:
        found = tl.dot(x_RK, tl.trans(w_CK), input_precision="ieee")
    return found


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
def _scaled(product, scale_C, scale_R, SWAP: tl.constexpr):
    """The product of two fp8 tiles, in what they stand for."""
    if SWAP:
        found = product * (scale_C[:, None] * scale_R[None, :])
    else:
        found = product * (scale_R[:, None] * scale_C[None, :])
    return found


@triton.jit
def _row_scales(
    scale_ptr, rows, is_row, start, WIDTH: tl.constexpr, X_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """What each row's values from `start` on are multiplied by; both parts by the same."""
    STRIDE: tl.constexpr = (WIDTH + X_BLOCK - 1) // X_BLOCK
    at = scale_ptr + rows // PARTS * STRIDE + start // X_BLOCK
    return tl.load(at, mask=is_row, other=0.0)


@triton.jit
def _part_rows(rows, is_row, PARTS: tl.constexpr):
    """Where the parts of these rows lie, and which there are."""
    if PARTS == 2:
        is_row = tl.interleave(is_row.to(tl.int8), is_row.to(tl.int8)) != 0
        rows = tl.interleave(rows * 2, rows * 2 + 1)
    return rows, is_row


@triton.jit
def _whole_rows(
    acc, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SWAP: tl.constexpr, PARTS: tl.constexpr
):
    """The product of whole activations, (R,C), from that of their parts."""
    if PARTS == 2:
        if not SWAP:
            acc = tl.trans(acc)
        large, rest = tl.split(tl.reshape(acc, (COLUMNS, ROWS, 2)))
        found = tl.trans(large + rest * (1.0 / REST))
    elif SWAP:
        found = tl.trans(acc)
    else:
        found = acc
    return found


@triton.jit
def _product(
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
    k = tl.arange(0, BLOCK_K)
    PART_ROWS: tl.constexpr = ROWS * PARTS
    x_rows, is_row = _part_rows(x_rows, is_row, PARTS)
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
        if SCALED:
            # The next step's scales are asked for before this step's product needs its own.
            ahead = tl.minimum(start + BLOCK_K, WIDTH - 1)
            next_scale_C = tl.load(scale_at + ahead // SCALE_BLOCK, mask=is_column, other=0.0)
            next_scale_R = _row_scales(x_scale_ptr, x_rows, is_row, ahead, WIDTH, X_BLOCK, PARTS)
            acc += _scaled(_tile_dot(w_CK, x_RK, SWAP, WIDEN), scale_C, scale_R, SWAP)
        else:
            acc += _tile_dot(w_CK, x_RK, SWAP, WIDEN)
        if TAIL > 0:
            tail_RK = _load_tile(tail_at, is_tail, start + k, WIDTH, BLOCK_K)
            if SCALED:
                tail_scale = _row_scales(x_scale_ptr, tail_rows, is_tail, start, WIDTH, X_BLOCK, 1)
                tail += _scaled(_tile_dot(w_CK, tail_RK, True, WIDEN), scale_C, tail_scale, True)
            else:
                tail += _tile_dot(w_CK, tail_RK, True, WIDEN)
            tail_at += BLOCK_K
        if SCALED:
            scale_C, scale_R = next_scale_C, next_scale_R
        x_at += BLOCK_K
        w_at += BLOCK_K * STRIDE_K
    return _whole_rows(acc, ROWS, COLUMNS, SWAP, PARTS), tl.trans(tail)


@triton.jit
def _described(
    x_ptr, x_scale_ptr, x_rows, is_row, tail_rows, is_tail,
    w, above, first, second, is_column, scale_ptr,
    WIDTH: tl.constexpr, SCALED: tl.constexpr, SCALE_STRIDE: tl.constexpr,
    X_BLOCK: tl.constexpr, PAIR: tl.constexpr,
    ROWS: tl.constexpr, TAIL: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """As `_product`, the copy engine reading the weights: `COLUMNS` rows of `w` from `first` on.

    With `PAIR` those from `second` on, too, against the same x, so that gate and up come apart.
    `above` are the rows of the experts before. Returns both products, then both of the tail's.
    """
    k, c = tl.arange(0, BLOCK_K), tl.arange(0, COLUMNS)
    PART_ROWS: tl.constexpr = ROWS * PARTS
    x_rows, is_row = _part_rows(x_rows, is_row, PARTS)
    x_at = x_ptr + x_rows[:, None] * WIDTH + k[None, :]
    tail_at = x_ptr + tail_rows[:, None] * WIDTH + k[None, :]
    TAIL_SIZE: tl.constexpr = TAIL if TAIL > 0 else 16
    one = tl.zeros((COLUMNS, PART_ROWS) if SWAP else (PART_ROWS, COLUMNS), dtype=tl.float32)
    two = tl.zeros((COLUMNS, PART_ROWS) if SWAP else (PART_ROWS, COLUMNS), dtype=tl.float32)
    one_tail = tl.zeros((COLUMNS, TAIL_SIZE), dtype=tl.float32)
    two_tail = tl.zeros((COLUMNS, TAIL_SIZE), dtype=tl.float32)
    one_at = scale_ptr + (first + c) // SCALE_BLOCK * SCALE_STRIDE
    two_at = scale_ptr + (second + c) // SCALE_BLOCK * SCALE_STRIDE
    for start in range(0, WIDTH, BLOCK_K):
        x_RK = _load_tile(x_at, is_row, start + k, WIDTH, BLOCK_K)
        one_CK = w.load([above + first, start])
        if PAIR:
            two_CK = w.load([above + second, start])
        if TAIL > 0:
            tail_RK = _load_tile(tail_at, is_tail, start + k, WIDTH, BLOCK_K)
        if SCALED:
            scale_R = _row_scales(x_scale_ptr, x_rows, is_row, start, WIDTH, X_BLOCK, PARTS)
            one_C = tl.load(one_at + start // SCALE_BLOCK, mask=is_column, other=0.0)
            one += _scaled(_tile_dot(one_CK, x_RK, SWAP, WIDEN), one_C, scale_R, SWAP)
            if PAIR:
                two_C = tl.load(two_at + start // SCALE_BLOCK, mask=is_column, other=0.0)
                two += _scaled(_tile_dot(two_CK, x_RK, SWAP, WIDEN), two_C, scale_R, SWAP)
            if TAIL > 0:
                tail_R = _row_scales(x_scale_ptr, tail_rows, is_tail, start, WIDTH, X_BLOCK, 1)
                one_tail += _scaled(_tile_dot(one_CK, tail_RK, True, WIDEN), one_C, tail_R, True)
                if PAIR:
                    found = _tile_dot(two_CK, tail_RK, True, WIDEN)
                    two_tail += _scaled(found, two_C, tail_R, True)
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


@triton.jit
def _store_gated(
    gate, up, rows, is_row, first, act_ptr, act_scale_ptr, limit, alpha, up_offset,
    M: tl.constexpr, GATED: tl.constexpr, HAS_LIMIT: tl.constexpr, ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The gate function on a tile of the first product; coded, each row of it has a scale."""
    if GATED:
        if HAS_LIMIT:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
        found = _activate(gate, ACTIVATION, alpha) * (up + up_offset)
    else:
        found = _activate(gate, ACTIVATION, alpha)
    m = first + tl.arange(0, BLOCK_C)
    at = act_ptr + rows.to(tl.int64)[:, None] * (PARTS * M) + m[None, :]
    inside = is_row[:, None] & (m < M)[None, :]
    if SCALED:
        whole = tl.where(inside, found, 0.0)
        found, scale_R = to_coded(whole, act_ptr.dtype.element_ty, WIDEN)
        if PARTS == 2:
            tl.store(at + M, rest_fp8(whole, scale_R, WIDEN), mask=inside)
        TILES: tl.constexpr = (M + BLOCK_C - 1) // BLOCK_C
        tl.store(act_scale_ptr + rows * TILES + first // BLOCK_C, scale_R, mask=is_row)
    tl.store(at, found.to(act_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gate_up_block(
    x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr,
    expert, tokens_R, slots_R, is_row, tokens_tail, slots_tail, is_tail,
    tile, limit, alpha, up_offset,
    D: tl.constexpr, M: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_K: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr, ACTIVATION: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, TAIL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, DESCRIBED: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One tile of the first product: `BLOCK_C` columns of the result, twice that of weights.

    `w_ptr` is a descriptor of all experts' rows, one below the other, where it is `DESCRIBED`.
    """
    WIDTH: tl.constexpr = 2 * M if GATED else M
    SCALE_STRIDE: tl.constexpr = (D + 127) // 128
    TAIL_SIZE: tl.constexpr = TAIL if TAIL > 0 else 16
    first = tile * BLOCK_C
    e = expert.to(tl.int64)
    own_scale_ptr = scale_ptr + e * (((WIDTH + 127) // 128) * SCALE_STRIDE)
    if DESCRIBED:
        m = first + tl.arange(0, BLOCK_C)
        gate, up, gate_tail, up_tail = _described(
            x_ptr, x_scale_ptr, tokens_R, is_row, tokens_tail, is_tail,
            w_ptr, expert.to(tl.int32) * WIDTH, first, first + M, m < M, own_scale_ptr,
            D, SCALED, SCALE_STRIDE, SCALE_BLOCK, GATED, ROWS, TAIL, BLOCK_C, BLOCK_K, SWAP,
            PARTS, WIDEN,
        )  # fmt: skip
        if HAS_BIAS:
            bias_at = bias_ptr + e * WIDTH + m
            gate_bias_C = tl.load(bias_at, mask=m < M, other=0.0).to(tl.float32)
            gate, gate_tail = gate + gate_bias_C[None, :], gate_tail + gate_bias_C[None, :]
            if GATED:
                up_bias_C = tl.load(bias_at + M, mask=m < M, other=0.0).to(tl.float32)
                up, up_tail = up + up_bias_C[None, :], up_tail + up_bias_C[None, :]
    else:
        COLUMNS: tl.constexpr = 2 * BLOCK_C if GATED else BLOCK_C
        j = tl.arange(0, COLUMNS)
        if GATED:  # gate, up, gate, up, ...: both of a column land in one thread
            m = first + j // 2
            columns = 2 * first + j if INTERLEAVED else m + (j % 2) * M
        else:
            m = first + j
            columns = m
        product, tail = _product(
            x_ptr, x_scale_ptr, tokens_R, is_row, tokens_tail, is_tail,
            w_ptr + e * (WIDTH * D), columns, m < M, own_scale_ptr,
            D, STRIDE_C, STRIDE_K, SCALED, SCALE_STRIDE, SCALE_BLOCK, M % BLOCK_C == 0,
            ROWS, TAIL, COLUMNS, BLOCK_K, SWAP, PARTS, WIDEN,
        )  # fmt: skip
        if HAS_BIAS:
            bias_C = tl.load(bias_ptr + e * WIDTH + columns, mask=m < M, other=0.0).to(tl.float32)
            product, tail = product + bias_C[None, :], tail + bias_C[None, :]
        if GATED:
            gate, up = tl.split(tl.reshape(product, (ROWS, BLOCK_C, 2)))
            gate_tail, up_tail = tl.split(tl.reshape(tail, (TAIL_SIZE, BLOCK_C, 2)))
        else:
            gate, up, gate_tail, up_tail = product, product, tail, tail
    _store_gated(
        gate, up, slots_R, is_row, first, act_ptr, act_scale_ptr, limit, alpha, up_offset,
        M, GATED, HAS_LIMIT, ACTIVATION, SCALED, BLOCK_C, PARTS, WIDEN,
    )  # fmt: skip
    if TAIL > 0:
        _store_gated(
            gate_tail, up_tail, slots_tail, is_tail, first, act_ptr, act_scale_ptr,
            limit, alpha, up_offset, M, GATED, HAS_LIMIT, ACTIVATION, SCALED, BLOCK_C, PARTS,
            WIDEN,
        )  # fmt: skip


@triton.jit
def _store_weighted(
    product, weight_R, rows, is_row, first, part_ptr, bias_C,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if HAS_BIAS:
        product += bias_C[None, :]
    d = first + tl.arange(0, BLOCK_C)
    at = part_ptr + rows.to(tl.int64)[:, None] * D + d[None, :]
    found = (product * weight_R[:, None]).to(part_ptr.dtype.element_ty)
    tl.store(at, found, mask=is_row[:, None] & (d < D)[None, :])


@triton.jit
def down_block(
    act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr,
    expert, slots_R, weight_R, is_row, slots_tail, weight_tail, is_tail, tile,
    D: tl.constexpr, M: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, X_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, DESCRIBED: tl.constexpr,
    PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One tile of the second product, weighed; `w_ptr` as in `gate_up_block`."""
    first = tile * BLOCK_C
    columns = first + tl.arange(0, BLOCK_C)
    is_column = columns < D
    e = expert.to(tl.int64)
    SCALE_STRIDE: tl.constexpr = (M + 127) // 128
    own_scale_ptr = scale_ptr + e * (((D + 127) // 128) * SCALE_STRIDE)
    rows, tail_rows = slots_R.to(tl.int64), slots_tail.to(tl.int64)
    if DESCRIBED:
        product, _second, tail, _second_tail = _described(
            act_ptr, act_scale_ptr, rows, is_row, tail_rows, is_tail,
            w_ptr, expert.to(tl.int32) * D, first, first, is_column, own_scale_ptr,
            M, SCALED, SCALE_STRIDE, X_BLOCK, False, ROWS, TAIL, BLOCK_C, BLOCK_K, SWAP, PARTS,
            WIDEN,
        )  # fmt: skip
    else:
        product, tail = _product(
            act_ptr, act_scale_ptr, rows, is_row, tail_rows, is_tail,
            w_ptr + e * (D * M), columns, is_column, own_scale_ptr,
            M, STRIDE_C, STRIDE_K, SCALED, SCALE_STRIDE, X_BLOCK, D % BLOCK_C == 0,
            ROWS, TAIL, BLOCK_C, BLOCK_K, SWAP, PARTS, WIDEN,
        )  # fmt: skip
    bias_C = tl.zeros((BLOCK_C,), dtype=tl.float32)
    if HAS_BIAS:
        bias_C = tl.load(bias_ptr + e * D + columns, mask=is_column, other=0.0).to(tl.float32)
    _store_weighted(
        product, weight_R, slots_R, is_row, first, part_ptr, bias_C, D, HAS_BIAS, BLOCK_C
    )
    if TAIL > 0:
        _store_weighted(
            tail, weight_tail, slots_tail, is_tail, first, part_ptr, bias_C, D, HAS_BIAS, BLOCK_C
        )
