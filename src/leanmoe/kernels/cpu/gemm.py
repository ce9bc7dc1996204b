"""What the CPU kernel does to one block of rows: products with packed matrices, and the gate."""

# mypy: ignore-errors
# numba infers the types.

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numba.extending import register_jitable

from leanmoe.kernels.cpu import llvm_microkernel
from leanmoe.kernels.cpu.llvm_microkernel import LANES, PANEL
from leanmoe.kernels.cpu.numba_compile import COMPILE

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
SILU, GELU, GELU_TANH, RELU, RELU2 = range(5)


@register_jitable
def padded(count, lanes):
    """`count` columns rounded up to whole groups of `lanes`."""
    return (count + lanes - 1) // lanes * lanes


@register_jitable
def padded_width(width, is_gated):
    """Columns that gate and up take up each; the packed first matrix has whole pairs of vectors."""
    return padded(width, LANES if is_gated else 2 * LANES)


@register_jitable
def padded_hidden(hidden):
    """Columns of the packed second matrix."""
    return padded(hidden, 2 * LANES)


def _block_product(vectors, is_bf16):
    """The product of a block of 1 to 6 rows: numba wants a call of its own for each."""
    one, two, three, four, five, six = llvm_microkernel.products(vectors, is_bf16)

    @njit(**COMPILE)
    def multiply(rows, x_rows, w, count, initial, out, stride):
        if rows == 1:
            one(x_rows, w, count, initial, out, stride)
        elif rows == 2:
            two(x_rows, w, count, initial, out, stride)
        elif rows == 3:
            three(x_rows, w, count, initial, out, stride)
        elif rows == 4:
            four(x_rows, w, count, initial, out, stride)
        elif rows == 5:
            five(x_rows, w, count, initial, out, stride)
        else:
            six(x_rows, w, count, initial, out, stride)

    return multiply


_f32_by_2, _f32_by_4 = _block_product(2, False), _block_product(4, False)
_bf16_by_2, _bf16_by_4 = _block_product(2, True), _block_product(4, True)


@njit(**COMPILE)
def multiply_rows(is_bf16, rows, x_rows, w, count, initial, out, columns):
    """`rows` rows times one expert's packed matrix of `count` x `columns`, panel by panel."""
    vectors, done = columns // LANES, 0
    while done < vectors:
        panel = min(PANEL, vectors - done)
        before = done * LANES
        start, into = initial + before * 4, out + before * 4
        at = w + before * count * (2 if is_bf16 else 4)
        if is_bf16 and panel == 2:
            _bf16_by_2(rows, x_rows, at, count, start, into, columns)
        elif is_bf16:
            _bf16_by_4(rows, x_rows, at, count, start, into, columns)
        elif panel == 2:
            _f32_by_2(rows, x_rows, at, count, start, into, columns)
        else:
            _f32_by_4(rows, x_rows, at, count, start, into, columns)
        done += panel


@njit(**COMPILE)
def _activate(kind, alpha, gate):
    """The activation in place, over whole vectors."""
    zero, half, address = np.float32(0.0), np.float32(0.5), gate.ctypes.data
    if kind == SILU:
        llvm_microkernel.silu(address, gate.size // LANES, alpha)
    elif kind == GELU_TANH:
        llvm_microkernel.gelu_tanh(address, gate.size // LANES, alpha)
    elif kind == GELU:
        for m in range(gate.size):
            gate[m] = half * gate[m] * np.float32(1.0 + math.erf(gate[m] * math.sqrt(0.5)))
    elif kind == RELU:
        for m in range(gate.size):
            gate[m] = zero if gate[m] < zero else gate[m]
    else:
        for m in range(gate.size):
            x = zero if gate[m] < zero else gate[m]
            gate[m] = x * x


@njit(**COMPILE)
def gate_rows(kind, is_gated, numbers, product, narrow, rows, width):
    """(rows, gate and up) to (rows, width): activation(gate) * (up + offset)."""
    limit, alpha, offset = numbers[0], numbers[1], numbers[2]
    stride = 2 * width if is_gated else width
    for r in range(rows):
        for m in range(width):
            value = product[r * stride + m]
            narrow[r * width + m] = limit if value > limit and is_gated else value
    _activate(kind, alpha, narrow[: rows * width])
    if is_gated:
        for r in range(rows):
            for m in range(width):
                value = product[r * stride + width + m]
                value = limit if value > limit else value
                value = -limit if value < -limit else value
                narrow[r * width + m] *= value + offset
