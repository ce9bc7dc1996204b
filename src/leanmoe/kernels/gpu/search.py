"""What `leanmoe kernels tune` tries: ways to cut a layer into tiles, by shape and tokens.

Chosen from wide searches on an H200 (docs/kernels.md): what was within a few percent of the best
for some shape, and no more, since each is compiled and timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from leanmoe.kernels.gpu.config import MOST_DIRECT_TOKENS, ExpertsConfig, Tile
from leanmoe.kernels.gpu.state import power_of_two
from leanmoe.kernels.gpu.tuned import Shape

SHARED_BYTES = 227 * 1024
"""Shared memory that a program may have on compute capability 9.0."""
MOST_SUMS = 176
"""Float32 sums a thread can hold beside what else it needs."""
FEW_ROWS = 32
FEW = (
    (16, 128, 4, 4),
    (32, 64, 4, 4),
    (32, 128, 4, 4),
    (32, 256, 4, 3),
    (64, 64, 4, 3),
    (64, 128, 4, 2),
    (64, 128, 4, 3),
    (64, 128, 8, 4),
    (64, 256, 4, 3),
    (128, 128, 8, 3),
)
"""Columns, depth in 2 bytes, warps and stages where rows are few: memory decides."""
MANY = (
    (64, 64, 8, 4),
    (128, 64, 4, 3),
    (128, 64, 8, 3),
    (128, 64, 8, 4),
    (256, 64, 8, 3),
    (256, 64, 8, 4),
)
"""The same where rows are many: the matrix unit decides."""


def ways(shape: Shape, tokens: int) -> list[ExpertsConfig]:
    """Rows of a block, and whether there is a work list; tiles come from `tiles`."""
    found = []
    if tokens <= MOST_DIRECT_TOKENS:
        found.append(ExpertsConfig(max(16, power_of_two(tokens)), 0, True))
    mean = tokens * shape.slots / shape.experts
    if tokens > 4 and mean <= 24:
        found += [ExpertsConfig(rows, 0, False) for rows in (16, 32) if rows <= max(16, 8 * mean)]
    if 8 <= mean <= 96:
        found.append(ExpertsConfig(64, 16, False))
    if mean >= 48:
        found.append(ExpertsConfig(128, 32, False))
    return found


def tiles(way: ExpertsConfig, shape: Shape, is_first: bool) -> Iterator[Tile]:
    """Tiles worth a try for one product under a way of cutting rows."""
    each = 1 if "float8" in shape.dtype else 4 if shape.dtype == "float32" else 2
    rows = way.rows + way.tail
    few = rows <= FEW_ROWS
    kinds = (False, True) if each == 1 else (False,)
    for (columns, depth, warps, stages), left, described in product(
        FEW if few else MANY, (True, False), kinds
    ):
        depth = min(128, depth * 2 // each) if each < 2 else depth * 2 // each
        wide = columns * 2 if is_first else columns
        if left and wide < 16 * warps:  # a warp takes 16 rows of the left operand
            continue
        if not left and wide < 8 * warps:
            continue
        shared = (wide * each + rows * max(each, 2)) * depth * stages
        if shared > SHARED_BYTES or rows * wide / (32 * warps) > MOST_SUMS:
            continue
        yield Tile(columns, depth, warps, stages, 1, left, described)
        if not few and not described and not is_first:
            yield Tile(columns, depth, warps, stages, 4, left, described)
