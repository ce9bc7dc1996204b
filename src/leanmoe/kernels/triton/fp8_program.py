"""Hidden states to fp8 e4m3, one scale for each token and block of 128 columns.

What DeepSeek-V3 does to activations before an fp8 product (its report, section 3.3.2); or as two
terms, what rounding took away beside what it left; or as float16 on the same scale.
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
def to_coded(x_XJ, kind: tl.constexpr, WIDEN: tl.constexpr):
    """Each row as fp8 e4m3, or as float16, and what it was divided by.

    Its largest value becomes fp8's largest, so that both kinds have one scale.
    """
    scale_X = tl.maximum(tl.max(tl.abs(x_XJ), axis=1), SMALLEST) / LARGEST
    coded_XJ = x_XJ / scale_X[:, None]
    IS_FLOAT16: tl.constexpr = kind == tl.float16
    return coded_XJ.to(tl.float16) if IS_FLOAT16 else _rounded(coded_XJ, WIDEN), scale_X


@triton.jit
def rest_fp8(x_XJ, scale_X, WIDEN: tl.constexpr):
    """What rounding to fp8 takes away from each row, as fp8: `REST` times as large, by its scale.

    The way back from fp8, which would say what rounding left, is compiled wrongly by Triton 3.6.0
    in some layouts (docs/results/kernels-gpu.md). So float32 is rounded by itself.
    """
    whole_XJ = x_XJ / scale_X[:, None]
    return _rounded((whole_XJ - _three_bits(whole_XJ)) * REST, WIDEN)


@triton.jit
def _rounded(x_XJ, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter loses the carry where rounding up reaches a power of two
        x_XJ = _three_bits(x_XJ)
    return x_XJ.to(tl.float8e4nv)


@triton.jit
def _three_bits(x_XJ):
    """float32, rounded to the three bits after the first that fp8 e4m3 has, ties to even.

    Numbers below fp8's smallest normal one, 2**-6 of 448, keep bits that fp8 has not.
    """
    bits = x_XJ.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def quantise_rows(
    # pointers
    x_ptr, q_ptr, scale_ptr,
    # compile-time
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr, FP8_TERMS: tl.constexpr,
    WIDEN: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """`CHUNK` blocks of one row."""
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    b, k = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK), tl.arange(0, SCALE_BLOCK)
    columns = b[:, None] * SCALE_BLOCK + k[None, :]
    x_XJ = tl.load(x_ptr + row * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    x_XJ = x_XJ.to(tl.float32)
    q_XJ, scale_X = to_coded(x_XJ, q_ptr.dtype.element_ty, WIDEN)
    at = q_ptr + row * (FP8_TERMS * WIDTH) + columns
    tl.store(at, q_XJ, mask=columns < WIDTH)
    if FP8_TERMS == 2:
        tl.store(at + WIDTH, rest_fp8(x_XJ, scale_X, WIDEN), mask=columns < WIDTH)
    tl.store(scale_ptr + row * BLOCKS + b, scale_X, mask=b < BLOCKS)
