"""What `leanmoe kernels tune` tries: ways to cut a layer into tiles, by shape and tokens.

Chosen from wide searches on an H200 (docs/kernels.md): what was within a few percent of the best
for some shape, and no more, since each is compiled and timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch

from leanmoe.kernels.triton.config import MOST_DIRECT_TOKENS, ExpertsConfig, Tile
from leanmoe.kernels.triton.state import power_of_two
from leanmoe.kernels.triton.tuned_tiles import Shape

SHARED_BYTES = 227 * 1024
"""Shared memory that a program may have on compute capability 9.0."""
MOST_SUMS = 176
"""Float32 sums a thread can hold beside what else it needs."""
FEW_ROWS = 32
PIECE_ROWS = 128
"""Of a block where rows are many; an expert that has several times as many has as many pieces."""
MOST_TWO_PART_ROWS = 24
"""Up to so many rows an expert has on average, fp8 activations are of two parts: memory decides
there, and twice the products cost nothing."""
FEW: tuple[tuple[int, int, int, int], ...] = (
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
"""Columns, depth (half of it for float32), warps and stages where rows are few: memory decides."""
MANY: tuple[tuple[int, int, int, int], ...] = (
    (64, 64, 8, 4),
    (128, 64, 4, 3),
    (128, 64, 8, 3),
    (128, 64, 8, 4),
    (128, 128, 8, 2),
    (256, 64, 8, 3),
    (256, 64, 8, 4),
)
"""The same where rows are many: the matrix unit decides."""


FP8_FIRST = tuple((128, 128, warps, stages) for warps in (4, 8) for stages in (3, 4, 5))
"""The first product of fp8 weights: its columns are the second's columns of one scale."""
FP8_SECOND = (
    (64, 128, 4, 3),
    (64, 128, 4, 5),
    (128, 128, 4, 3),
    (128, 128, 8, 4),
    (256, 128, 8, 3),
)
FLOAT16_SECOND = (
    (64, 64, 4, 4),
    (128, 64, 4, 3),
    (128, 64, 8, 4),
    (128, 128, 8, 3),
    (256, 64, 8, 3),
)
"""The second product of fp8 weights in float16: they take registers, so tiles are less deep."""
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
    if is_fp8(shape):
        return _ways_of_fp8(found, mean)
    if 8 <= mean <= 96:
        found.append(ExpertsConfig(64, 16, False))
    if mean >= 48:
        pieces = {1, max(1, round(mean / PIECE_ROWS))}
        found += [ExpertsConfig(PIECE_ROWS, 32, False, pieces=n) for n in sorted(pieces)]
    return found


def _ways_of_fp8(for_few: list[ExpertsConfig], mean: float) -> list[ExpertsConfig]:
    """Activations of two parts while memory decides; then of one, float16 between the products.

    fp8 there, too, is faster, and 4.1 to 4.4% off in a layer of DeepSeek-V3's width, for 3.5 to
    3.7% (docs/kernels.md): how far off is too far is the tuner's to say.
    """
    if mean <= MOST_TWO_PART_ROWS:
        return [replace(way, parts=2) for way in for_few]
    blocks = [(64, 16)] if mean <= 96 else [(64, 0)]
    if mean >= 48:
        blocks.append((PIECE_ROWS, 32))
    found = [ExpertsConfig(rows, tail, False, float16_act=True) for rows, tail in blocks]
    return [ExpertsConfig(*blocks[0], False), *found]


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
    rows = (way.rows + way.tail) * way.parts
    few = way.block_rows <= FEW_ROWS
    cuts = FEW if few else MANY
    if is_fp8(shape):
        cuts = FP8_FIRST if is_first else FP8_SECOND
        if way.float16_act and not is_first:
            cuts = FLOAT16_SECOND
    for (columns, depth, warps, stages), left, described in product(
        cuts, (True, False), (False, True) if is_fp8(shape) else (False,)
    ):
        if way.parts == 2 and not left:
            continue
        depth = depth // 2 if each == 4 else depth
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


def is_fp8(shape: Shape) -> bool:
    """Whether the weights are fp8 with block scales."""
    return shape.dtype.startswith("float8")
