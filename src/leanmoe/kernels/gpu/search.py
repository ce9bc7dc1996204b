"""What `leanmoe kernels tune` tries: ways to cut a layer into tiles, by shape and tokens."""

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


def ways(shape: Shape, tokens: int) -> list[ExpertsConfig]:
    """Rows of a block, and whether there is a work list; tiles come from `tiles`."""
    found = []
    if tokens <= MOST_DIRECT_TOKENS:
        found.append(ExpertsConfig(max(16, power_of_two(tokens)), 0, True))
    mean = tokens * shape.slots / shape.experts
    if tokens > 4:
        sizes = (16, 32, 64, 128)
        least = next((s for s in sizes if s >= mean), 128)
        near = [s for s in sizes if least // 2 <= s <= 2 * least]
        found += [ExpertsConfig(rows, 0, False) for rows in near]
        if mean >= 48:
            found.append(ExpertsConfig(128, 32, False))
        elif mean >= 24:
            found.append(ExpertsConfig(64, 16, False))
    return found


def tiles(way: ExpertsConfig, shape: Shape, is_first: bool) -> Iterator[Tile]:
    """Tiles worth a try for one product under a way of cutting rows."""
    bytes_each = 1 if "float8" in shape.dtype else 4 if "32" in shape.dtype else 2
    rows = way.rows + way.tail
    few = rows <= 32
    columns = (16, 32, 64, 128) if few else (64, 128, 256)
    depths = (64, 128, 256) if few else (64,) if bytes_each == 2 else (64, 128)
    groups = (1,) if few else (1, 4)
    stages = (2, 3, 4, 6) if few else (3, 4)
    for cols, depth, warps, steps, group, left, described in product(
        columns, depths, (4, 8), stages, groups, (True, False), (True, False)
    ):
        wide = cols * 2 if is_first else cols
        if depth * bytes_each > 512 or (depth > 128 and bytes_each == 1):
            continue
        if steps > 4 and depth > 64:
            continue
        if left and wide < 16 * warps:  # a warpgroup takes 64 rows of the left operand
            continue
        if not left and wide < 8 * warps:
            continue
        shared = (wide * bytes_each + rows * max(bytes_each, 2)) * depth * steps
        sums = rows * wide / (32 * warps)
        if shared > SHARED_BYTES or shared < 24 * 1024 or sums > MOST_SUMS:
            continue
        if not few and sums < 16:
            continue
        yield Tile(cols, depth, warps, steps, group, left, described)
