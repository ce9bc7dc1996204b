"""One tile of the experts' two products: what every way of running them is made of.

Letters: T tokens, K slots a token, E experts, D hidden width, M expert width, X rows of one block
(slots of one expert), J columns of one tile of a product, I columns it is summed over.

The first product reads a block's token rows and writes activation(gate) * up to `act_XM`, one row
a slot. The second multiplies these, adds the bias, weighs and writes `part_XD`.
"""

# mypy: ignore-errors
# Triton's language is not Python's: names are constexprs, tensors or pointers as they are used.

from __future__ import annotations

import triton
import triton.language as tl

from leanmoe.kernels.triton.fp8_program import rest_fp8, to_coded
from leanmoe.kernels.triton.product_program import product_of, products_by_tma

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
def _store_gated(
    # rows and places
    gate, up, rows, is_row, first,
    # pointers
    act_ptr, act_scale_ptr,
    # sizes and numbers
    limit, alpha, up_offset,
    # compile-time
    fixed: tl.constexpr,
):  # fmt: skip
    """The gate function on a tile of the first product; coded, each row of it has a scale."""
    if fixed.GATED:
        if fixed.HAS_LIMIT:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
        gated = _activate(gate, fixed.ACTIVATION, alpha) * (up + up_offset)
    else:
        gated = _activate(gate, fixed.ACTIVATION, alpha)
    m = first + tl.arange(0, fixed.BLOCK_N)
    at = act_ptr + rows.to(tl.int64)[:, None] * (fixed.FP8_TERMS * fixed.M) + m[None, :]
    inside = is_row[:, None] & (m < fixed.M)[None, :]
    if fixed.SCALED:
        whole = tl.where(inside, gated, 0.0)
        gated, scale_X = to_coded(whole, act_ptr.dtype.element_ty, fixed.WIDEN)
        if fixed.FP8_TERMS == 2:
            tl.store(at + fixed.M, rest_fp8(whole, scale_X, fixed.WIDEN), mask=inside)
        TILES: tl.constexpr = (fixed.M + fixed.BLOCK_N - 1) // fixed.BLOCK_N
        tl.store(act_scale_ptr + rows * TILES + first // fixed.BLOCK_N, scale_X, mask=is_row)
    tl.store(at, gated.to(act_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gate_up_block(
    # pointers
    x_ptr, x_scale_ptr, w_ptr, bias_ptr, scale_ptr, act_ptr, act_scale_ptr,
    # rows and places
    expert, tokens_X, slots_X, is_row, tokens_tail, slots_tail, is_tail, tile,
    # sizes and numbers
    limit, alpha, up_offset,
    # compile-time
    fixed: tl.constexpr, TAIL_M: tl.constexpr,
):  # fmt: skip
    """One tile of the first product: `BLOCK_N` columns of the result, twice that of weights.

    `w_ptr` is a descriptor of all experts' rows, one below the other, where it is `USE_TMA`.
    """
    WIDTH: tl.constexpr = 2 * fixed.M if fixed.GATED else fixed.M
    SCALE_STRIDE: tl.constexpr = (fixed.D + 127) // 128
    TAIL_SIZE: tl.constexpr = TAIL_M if TAIL_M > 0 else 16
    first = tile * fixed.BLOCK_N
    e = expert.to(tl.int64)
    own_scale_ptr = scale_ptr + e * (((WIDTH + 127) // 128) * SCALE_STRIDE)
    if fixed.USE_TMA:
        m = first + tl.arange(0, fixed.BLOCK_N)
        gate, up, gate_tail, up_tail = products_by_tma(
            x_ptr, x_scale_ptr, tokens_X, is_row, tokens_tail, is_tail,
            w_ptr, expert.to(tl.int32) * WIDTH, first, first + fixed.M, m < fixed.M, own_scale_ptr,
            fixed, fixed.D, TAIL_M,
        )  # fmt: skip
        if fixed.HAS_BIAS:
            bias_at = bias_ptr + e * WIDTH + m
            gate_bias_J = tl.load(bias_at, mask=m < fixed.M, other=0.0).to(tl.float32)
            gate, gate_tail = gate + gate_bias_J[None, :], gate_tail + gate_bias_J[None, :]
            if fixed.GATED:
                up_bias_J = tl.load(bias_at + fixed.M, mask=m < fixed.M, other=0.0).to(tl.float32)
                up, up_tail = up + up_bias_J[None, :], up_tail + up_bias_J[None, :]
    else:
        COLUMNS: tl.constexpr = 2 * fixed.BLOCK_N if fixed.GATED else fixed.BLOCK_N
        j = tl.arange(0, COLUMNS)
        if fixed.GATED:  # gate, up, gate, up, ...: both of a column land in one thread
            m = first + j // 2
            columns = 2 * first + j if fixed.INTERLEAVED else m + (j % 2) * fixed.M
        else:
            m = first + j
            columns = m
        product, tail = product_of(
            x_ptr, x_scale_ptr, tokens_X, is_row, tokens_tail, is_tail,
            w_ptr + e * (WIDTH * fixed.D), columns, m < fixed.M, own_scale_ptr,
            fixed, fixed.D, COLUMNS, fixed.M % fixed.BLOCK_N == 0, TAIL_M,
        )  # fmt: skip
        if fixed.HAS_BIAS:
            bias_at = bias_ptr + e * WIDTH + columns
            bias_J = tl.load(bias_at, mask=m < fixed.M, other=0.0).to(tl.float32)
            product, tail = product + bias_J[None, :], tail + bias_J[None, :]
        if fixed.GATED:
            gate, up = tl.split(tl.reshape(product, (fixed.BLOCK_M, fixed.BLOCK_N, 2)))
            gate_tail, up_tail = tl.split(tl.reshape(tail, (TAIL_SIZE, fixed.BLOCK_N, 2)))
        else:
            gate, up, gate_tail, up_tail = product, product, tail, tail
    _store_gated(
        gate, up, slots_X, is_row, first, act_ptr, act_scale_ptr, limit, alpha, up_offset, fixed
    )
    if TAIL_M > 0:
        _store_gated(
            gate_tail, up_tail, slots_tail, is_tail, first, act_ptr, act_scale_ptr,
            limit, alpha, up_offset, fixed,
        )  # fmt: skip


@triton.jit
def _store_weighted(
    # rows and places
    product, weight_X, rows, is_row, first,
    # pointers, and a tile's biases
    part_ptr, bias_J,
    # compile-time
    fixed: tl.constexpr,
):  # fmt: skip
    """Weighs a tile of the second product and writes it to each slot's row."""
    if fixed.HAS_BIAS:
        product += bias_J[None, :]
    d = first + tl.arange(0, fixed.BLOCK_N)
    at = part_ptr + rows.to(tl.int64)[:, None] * fixed.D + d[None, :]
    weighed = (product * weight_X[:, None]).to(part_ptr.dtype.element_ty)
    tl.store(at, weighed, mask=is_row[:, None] & (d < fixed.D)[None, :])


@triton.jit
def down_block(
    # pointers
    act_ptr, act_scale_ptr, w_ptr, bias_ptr, scale_ptr, part_ptr,
    # rows and places
    expert, slots_X, weight_X, is_row, slots_tail, weight_tail, is_tail, tile,
    # compile-time
    fixed: tl.constexpr, TAIL_M: tl.constexpr,
):  # fmt: skip
    """One tile of the second product, weighed; `w_ptr` as in `gate_up_block`."""
    first = tile * fixed.BLOCK_N
    columns = first + tl.arange(0, fixed.BLOCK_N)
    is_column = columns < fixed.D
    e = expert.to(tl.int64)
    SCALE_STRIDE: tl.constexpr = (fixed.M + 127) // 128
    own_scale_ptr = scale_ptr + e * (((fixed.D + 127) // 128) * SCALE_STRIDE)
    rows, tail_rows = slots_X.to(tl.int64), slots_tail.to(tl.int64)
    if fixed.USE_TMA:
        product, _second, tail, _second_tail = products_by_tma(
            act_ptr, act_scale_ptr, rows, is_row, tail_rows, is_tail,
            w_ptr, expert.to(tl.int32) * fixed.D, first, first, is_column, own_scale_ptr,
            fixed, fixed.M, TAIL_M,
        )  # fmt: skip
    else:
        product, tail = product_of(
            act_ptr, act_scale_ptr, rows, is_row, tail_rows, is_tail,
            w_ptr + e * (fixed.D * fixed.M), columns, is_column, own_scale_ptr,
            fixed, fixed.M, fixed.BLOCK_N, fixed.D % fixed.BLOCK_N == 0, TAIL_M,
        )  # fmt: skip
    bias_J = tl.zeros((fixed.BLOCK_N,), dtype=tl.float32)
    if fixed.HAS_BIAS:
        bias_J = tl.load(bias_ptr + e * fixed.D + columns, mask=is_column, other=0.0).to(tl.float32)
    _store_weighted(product, weight_X, slots_X, is_row, first, part_ptr, bias_J, fixed)
    if TAIL_M > 0:
        _store_weighted(tail, weight_tail, slots_tail, is_tail, first, part_ptr, bias_J, fixed)


@triton.jit
def silu_of_kept_rows(
    # pointers
    gate_up_ptr, act_ptr, ids_ptr, local_ptr,
    # sizes
    width,
    # compile-time
    HAS_LOCAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of one slot's row; without an expert here, nothing is read or written."""
    x = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids_ptr + x)
    if HAS_LOCAL:
        local = tl.load(local_ptr + tl.maximum(expert, 0)).to(expert.dtype)
        expert = tl.where(expert < 0, expert, local)
    if expert >= 0:
        m = tl.arange(0, BLOCK)
        is_column = m < width
        gate_ptr = gate_up_ptr + x * 2 * width
        gate = tl.load(gate_ptr + m, mask=is_column, other=0.0).to(tl.float32)
        up = tl.load(gate_ptr + width + m, mask=is_column, other=0.0).to(tl.float32)
        # vLLM's operator rounds between its two steps.
        silu = (gate / (1.0 + tl.exp(-gate))).to(act_ptr.dtype.element_ty).to(tl.float32)
        tl.store(act_ptr + x * width + m, (silu * up).to(act_ptr.dtype.element_ty), mask=is_column)
