"""Hidden states to fp8 e4m3, one scale for each token and block of 128 columns.

What DeepSeek-V3 does to activations before an fp8 product (its report, section 3.3.2); or in two
parts, what rounding took away beside what it left.
"""

# mypy: ignore-errors
# Triton's language is not Python's: names are constexprs, tensors or pointers as they are used.

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from leanmoe.kernels.gpu.tile_program import SCALE_BLOCK, rest_fp8, to_fp8


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
    q_BK, scale_B = to_fp8(x_BK, WIDEN)
    at = q_ptr + row * (PARTS * WIDTH) + columns
    tl.store(at, q_BK, mask=columns < WIDTH)
    if PARTS == 2:
        tl.store(at + WIDTH, rest_fp8(x_BK, q_BK, scale_B, WIDEN), mask=columns < WIDTH)
    tl.store(scale_ptr + row * BLOCKS + b, scale_B, mask=b < BLOCKS)
