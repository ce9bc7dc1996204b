"""Hidden states to fp8 e4m3, one scale for each token and block of 128 columns.

What DeepSeek-V3 does to activations before an fp8 product (its report, section 3.3.2); or in two
parts, what rounding took away beside what it left; or as float16 on the same scale.
"""

# mypy: ignore-errors
# Triton's language is not Python's: names are constexprs, tensors or pointers as they are used.

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

SCALE_BLOCK = tl.constexpr(128)
"""fp8 weights have one scale for so many rows and columns (DeepSeek-V3 report, section 3.3.2)."""

LARGEST = tl.constexpr(448.0)
"""The largest number that fp8 e4m3 has."""
REST = tl.constexpr(16.0)
"""What rounding to fp8 e4m3 takes away is no more than a sixteenth of the number."""
SMALLEST = tl.constexpr(1e-10)
"""A row of zeros is divided by something."""


@triton.jit
def to_coded(x_RC, kind: tl.constexpr, WIDEN: tl.constexpr):
    """Each row as fp8 e4m3, or as float16, and what it was divided by.

    Its largest value becomes fp8's largest, so that both kinds have one scale.
    """
    scale_R = tl.maximum(tl.max(tl.abs(x_RC), axis=1), SMALLEST) / LARGEST
    coded_RC = x_RC / scale_R[:, None]
    IS_FLOAT16: tl.constexpr = kind == tl.float16
    return coded_RC.to(tl.float16) if IS_FLOAT16 else _rounded(coded_RC, WIDEN), scale_R


@triton.jit
def rest_fp8(x_RC, scale_R, WIDEN: tl.constexpr):
    """What rounding to fp8 takes away from each row, as fp8: `REST` times as large, by its scale.

    The way back from fp8, which would say what rounding left, is compiled wrongly by Triton 3.6.0
    in some layouts (docs/kernels.md). So float32 is rounded by itself.
    """
    whole_RC = x_RC / scale_R[:, None]
    return _rounded((whole_RC - _three_bits(whole_RC)) * REST, WIDEN)


@triton.jit
def _rounded(x_RC, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter loses the carry where rounding up reaches a power of two
        x_RC = _three_bits(x_RC)
    return x_RC.to(tl.float8e4nv)


@triton.jit
def _three_bits(x_RC):
    """float32, rounded to the three bits after the first that fp8 e4m3 has, ties to even.

    Numbers below fp8's smallest normal one, 2**-6 of 448, keep bits that fp8 has not.
    """
    bits = x_RC.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def quantise_rows(
    x_ptr, q_ptr, scale_ptr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
    WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`CHUNK` blocks of one row."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    b, k = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK), tl.arange(0, SCALE_BLOCK)
    columns = b[:, None] * SCALE_BLOCK + k[None, :]
    x_BK = tl.load(x_ptr + row * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    x_BK = x_BK.to(tl.float32)
    q_BK, scale_B = to_coded(x_BK, q_ptr.dtype.element_ty, WIDEN)
    at = q_ptr + row * (PARTS * WIDTH) + columns
    tl.store(at, q_BK, mask=columns < WIDTH)
    if PARTS == 2:
        tl.store(at + WIDTH, rest_fp8(x_BK, scale_B, WIDEN), mask=columns < WIDTH)
    tl.store(scale_ptr + row * BLOCKS + b, scale_B, mask=b < BLOCKS)
