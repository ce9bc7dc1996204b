"""What `leanmoe kernels tune` tries: ways to cut a layer into tiles, by shape and tokens.

Chosen from wide searches on an H200 (docs/kernels.md): what was within a few percent of the best
for some shape, and no more, since each is compiled and timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch

from leanmoe.kernels.gpu.config import MOST_DIRECT_TOKENS, ExpertsConfig, Tile
from leanmoe.kernels.gpu.state import power_of_two
from leanmoe.kernels.gpu.tuned import Shape

SHARED_BYTES = 227 * 1024
"""Shared memory that a program may have on compute capability 9.0."""
MOST_SUMS = 176
"""Float32 sums a thread can hold beside what else it needs."""
FEW_ROWS = 32
MOST_TWO_PART_ROWS = 24
"""Up to so many rows an expert has on average, fp8 activations are of two parts in both products:
memory decides there, and twice the products cost nothing. Above, in the second product alone, which
has a third of the operations: the layer is then 3.7% off float64 in place of 4.3%, computed with
normal random numbers of DeepSeek-V3's shape."""
Cuts = tuple[tuple[int, int, int, int], ...]
"""Columns, depth (half of it for float32), warps and stages of tiles."""
FEW: Cuts = (
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
"""Where rows are few: memory decides."""
MANY: Cuts = (
    (64, 64, 8, 4),
    (128, 64, 4, 3),
    (128, 64, 8, 3),
    (128, 64, 8, 4),
    (128, 128, 8, 2),
    (256, 64, 8, 3),
    (256, 64, 8, 4),
)
"""Where rows are many: the matrix unit decides, and what L2 gives."""
FP8_FIRST = tuple((128, 128, warps, stages) for warps in (4, 8) for stages in (3, 4, 5))
"""The first product of fp8 weights: its columns are the second's columns of one scale."""
FP8_SECOND = (
    (64, 128, 4, 3),
    (64, 128, 4, 5),
    (128, 128, 4, 3),
    (128, 128, 8, 4),
    (256, 128, 8, 3),
)
FP8_FIRST_MANY = ((128, 128, 8, 3), (128, 128, 16, 3), (128, 128, 16, 4))
"""The first product of fp8 weights where a piece has 128 rows: sums, and a step's product before it
is scaled, leave no registers for a tail."""
FP8_SECOND_MANY = (
    (64, 128, 4, 2),
    (64, 128, 4, 3),
    (64, 128, 8, 3),
    (128, 128, 8, 3),
    (128, 128, 8, 4),
)
FP8_MANY_ROWS = 128

MOST_JOINED_TOKENS = 4
"""Above, tokens have experts in common, whose weights the joined way would read for each."""
JOINED = (
    (4, 256, 4),
    (4, 512, 4),
    (4, 512, 8),
    (8, 128, 4),
    (8, 256, 4),
    (8, 256, 8),
    (8, 512, 8),
    (16, 128, 4),
    (16, 128, 8),
    (32, 64, 8),
)
"""Columns, depth and warps of the second product where it adds up the slots: eight experts' tiles
are held in registers, twice."""


def ways(shape: Shape, tokens: int) -> list[ExpertsConfig]:
    """Rows of a block, and whether there is a work list; tiles come from `tiles`."""
    mean = tokens * shape.slots / shape.experts
    found = _ways_for_few(tokens, mean)
    if is_fp8(shape) and mean <= MOST_TWO_PART_ROWS:
        return [replace(way, parts=2, act_parts=2) for way in found]
    if 8 <= mean <= 96:
        found.append(ExpertsConfig(64, 16, False))
    if mean >= 48:
        found += [ExpertsConfig(128, 32, False, pieces=n) for n in sorted({1, _pieces(128, mean)})]
    if is_fp8(shape):
        if mean > 96:
            found.append(ExpertsConfig(64, 32, False, pieces=_pieces(64, mean)))
        return [replace(way, act_parts=2, down=_side(way)) for way in found]
    return found


def _side(way: ExpertsConfig) -> Tile:
    """The weights are on the left where rows are few: a tile of two parts must say so."""
    return Tile(weights_left=way.rows <= FEW_ROWS)


def _pieces(rows: int, mean: float) -> int:
    """Pieces of so many rows that an expert of the mean number has."""
    return max(1, round(mean / rows))


def _ways_for_few(tokens: int, mean: float) -> list[ExpertsConfig]:
    """Those for few rows an expert, `mean` of them on average."""
    found = []
    if tokens <= MOST_DIRECT_TOKENS:
        direct = ExpertsConfig(max(16, power_of_two(tokens)), 0, True)
        found.append(direct)
        if tokens <= MOST_JOINED_TOKENS:
            found.append(replace(direct, is_joined=True))
    if tokens > 4 and mean <= 24:
        found += [ExpertsConfig(rows, 0, False) for rows in (16, 32) if rows <= max(16, 8 * mean)]
    return found


def tiles(way: ExpertsConfig, shape: Shape, is_first: bool) -> Iterator[Tile]:
    """Tiles worth a try for one product under a way of cutting rows."""
    if way.is_joined and not is_first:
        yield from (Tile(columns, depth, warps, 1) for columns, depth, warps in JOINED)
        return
    each = getattr(torch, shape.dtype).itemsize
    parts = way.parts if is_first else way.act_parts
    few = way.block_rows <= FEW_ROWS
    apart = is_fp8(shape) and is_first and way.rows == FP8_MANY_ROWS
    for (columns, depth, warps, stages), left, described in product(
        _cuts(way, shape, is_first), (True, False), (False, True) if is_fp8(shape) else (False,)
    ):
        if parts == 2 and left == (way.rows > FEW_ROWS):
            continue  # side by side where rows are few, one after the other where they are many
        if apart and (left or not described):
            continue  # no registers for it
        rows = (way.rows + (0 if apart else way.tail)) * parts
        depth = depth // 2 if each == 4 else depth
        wide = columns * 2 if is_first else columns
        if left and wide < 16 * warps:  # a warp takes 16 rows of the left operand
            continue
        if not left and wide < 8 * warps:
            continue
        shared = (wide + rows) * each * depth * stages
        sums = rows * wide // (1 if left else parts)
        if shared > SHARED_BYTES or sums / (32 * warps) > MOST_SUMS:
            continue
        yield Tile(columns, depth, warps, stages, 1, left, described, apart)
        if not few and not described and not is_first:
            yield Tile(columns, depth, warps, stages, 4, left, described, apart)


def _cuts(way: ExpertsConfig, shape: Shape, is_first: bool) -> Cuts:
    if not is_fp8(shape):
        return FEW if way.block_rows <= FEW_ROWS else MANY
    if way.rows == FP8_MANY_ROWS:
        return FP8_FIRST_MANY if is_first else FP8_SECOND_MANY
    return FP8_FIRST if is_first else FP8_SECOND


def is_fp8(shape: Shape) -> bool:
    """Whether the weights are fp8 with block scales."""
    return shape.dtype.startswith("float8")
