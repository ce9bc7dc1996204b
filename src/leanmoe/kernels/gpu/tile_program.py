"""One tile of the experts' two products: what every way of running them is made of.

Letters: T tokens, K slots a token, N = T*K slots, E experts, D hidden width, M expert width,
R rows of one block, C columns of one tile.

The first product reads a block's token rows and writes activation(gate) * up to `act_NM`, one row
a slot. The second multiplies these, adds the bias, weighs and writes `part_ND`.
"""

# mypy: ignore-errors
# Triton's language is not Python's: names are constexprs, tensors or pointers as they are used.

from __future__ import annotations

import triton
import triton.language as tl

from leanmoe.kernels.gpu.product_program import (
    REST,
    SCALE_BLOCK,
    described_product,
    pointed_product,
)

SILU, GELU, GELU_TANH, RELU, RELU2 = (tl.constexpr(i) for i in range(5))
"""Numbers of the activations, in the order of `kernels.weights.ACTIVATIONS`."""
LARGEST = tl.constexpr(448.0)
"""The largest number that fp8 e4m3 has."""
SMALLEST = tl.constexpr(1e-10)
"""A row of zeros is divided by something."""


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
def to_fp8(x_RC, WIDEN: tl.constexpr):
    """Each row as fp8 e4m3 and what it was divided by: its largest value becomes fp8's largest."""
    scale_R = tl.maximum(tl.max(tl.abs(x_RC), axis=1), SMALLEST) / LARGEST
    return _rounded(x_RC / scale_R[:, None], WIDEN), scale_R


@triton.jit
def rest_fp8(x_RC, coded_RC, scale_R, WIDEN: tl.constexpr):
    """What `to_fp8` took away from each row, as fp8: `REST` times as large, by the same scale."""
    return _rounded((x_RC / scale_R[:, None] - coded_RC.to(tl.float32)) * REST, WIDEN)


@triton.jit
def _rounded(x_RC, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter loses the carry where rounding up reaches a power of two
        bits = x_RC.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
        x_RC = bits.to(tl.float32, bitcast=True)
    return x_RC.to(tl.float8e4nv)


@triton.jit
def _store_gated(
    gate, up, rows, is_row, first, act_ptr, act_scale_ptr, limit, alpha, up_offset,
    M: tl.constexpr, GATED: tl.constexpr, HAS_LIMIT: tl.constexpr, ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr, BLOCK_C: tl.constexpr, ACT_PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The gate function on a tile of the first product; fp8 with a scale for a row of the tile."""
    if GATED:
        if HAS_LIMIT:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
        found = _activate(gate, ACTIVATION, alpha) * (up + up_offset)
    else:
        found = _activate(gate, ACTIVATION, alpha)
    m = first + tl.arange(0, BLOCK_C)
    at = act_ptr + rows.to(tl.int64)[:, None] * (ACT_PARTS * M) + m[None, :]
    inside = is_row[:, None] & (m < M)[None, :]
    if SCALED:
        whole = tl.where(inside, found, 0.0)
        found, scale_R = to_fp8(whole, WIDEN)
        if ACT_PARTS == 2:
            tl.store(at + M, rest_fp8(whole, found, scale_R, WIDEN), mask=inside)
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
    SWAP: tl.constexpr, DESCRIBED: tl.constexpr, PARTS: tl.constexpr, ACT_PARTS: tl.constexpr,
    WIDEN: tl.constexpr,
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
        ONE_SCALE: tl.constexpr = SCALE_BLOCK % BLOCK_C == 0 and M % BLOCK_C == 0
        m = first + tl.arange(0, BLOCK_C)
        gate, up, gate_tail, up_tail = described_product(
            x_ptr, x_scale_ptr, tokens_R, is_row, tokens_tail, is_tail,
            w_ptr, expert.to(tl.int32) * WIDTH, first, first + M, m < M, own_scale_ptr,
            D, SCALED, SCALE_STRIDE, SCALE_BLOCK, ONE_SCALE, GATED, ROWS, TAIL, BLOCK_C, BLOCK_K,
            SWAP, PARTS, WIDEN,
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
        product, tail = pointed_product(
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
        M, GATED, HAS_LIMIT, ACTIVATION, SCALED, BLOCK_C, ACT_PARTS, WIDEN,
    )  # fmt: skip
    if TAIL > 0:
        _store_gated(
            gate_tail, up_tail, slots_tail, is_tail, first, act_ptr, act_scale_ptr,
            limit, alpha, up_offset, M, GATED, HAS_LIMIT, ACTIVATION, SCALED, BLOCK_C, ACT_PARTS,
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
        product, _second, tail, _second_tail = described_product(
            act_ptr, act_scale_ptr, rows, is_row, tail_rows, is_tail,
            w_ptr, expert.to(tl.int32) * D, first, first, is_column, own_scale_ptr,
            M, SCALED, SCALE_STRIDE, X_BLOCK, SCALE_BLOCK % BLOCK_C == 0, False, ROWS, TAIL,
            BLOCK_C, BLOCK_K, SWAP, PARTS, WIDEN,
        )  # fmt: skip
    else:
        product, tail = pointed_product(
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
