"""What `leanmoe kernels tune` tries: how to cut a layer into tiles, by shape and tokens.

Chosen from wide searches on an H200 (docs/results/kernels-gpu.md): what was within a few percent of
the best for some shape, and no more, since each is compiled and timed.
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
SUBBLOCK_ROWS = 128
"""Where rows are many; an expert that has several times as many has as many subblocks."""
MOST_TWO_TERM_ROWS = 24
"""Up to so many rows an expert has on average, fp8 activations are of two terms: memory decides
there, and twice the products cost nothing."""
FEW: tuple[tuple[int, int, int, int], ...] = (
    (16, 128, 4, 4), (32, 64, 4, 4), (32, 128, 4, 4), (32, 256, 4, 3), (64, 64, 4, 3),
    (64, 128, 4, 2), (64, 128, 4, 3), (64, 128, 8, 4), (64, 256, 4, 3), (128, 128, 8, 3),
)  # fmt: skip
"""BLOCK_N, BLOCK_K (half of it for float32), num_warps and num_stages where rows are few: memory
decides."""
MANY: tuple[tuple[int, int, int, int], ...] = (
    (64, 64, 8, 4), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2),
    (256, 64, 8, 3), (256, 64, 8, 4),
)  # fmt: skip
"""The same where rows are many: the matrix unit decides."""
FP8_FIRST = tuple((128, 128, warps, stages) for warps in (4, 8) for stages in (3, 4, 5))
"""The first product of fp8 weights: its columns are the second's columns of one scale."""
FP8_SECOND = (
    (64, 128, 4, 3), (64, 128, 4, 5), (128, 128, 4, 3), (128, 128, 8, 4), (256, 128, 8, 3),
)  # fmt: skip
FLOAT16_SECOND = (
    (64, 64, 4, 4), (128, 64, 4, 3), (128, 64, 8, 4), (128, 128, 8, 3), (256, 64, 8, 3),
)  # fmt: skip
"""The second product of fp8 weights in float16: they take registers, so tiles are less deep."""
MOST_FUSED_TOKENS = 4
"""Above, tokens have experts in common, whose weights the fused sum would read for each."""
FUSED_SUM = (
    (4, 256, 4), (4, 512, 4), (4, 512, 8), (8, 128, 4), (8, 256, 4), (8, 256, 8), (8, 512, 8),
    (16, 128, 4), (16, 128, 8), (32, 64, 8),
)  # fmt: skip
"""BLOCK_N, BLOCK_K and num_warps of the second product where it adds up the slots: eight experts'
tiles are held in registers, twice."""


def base_configs(shape: Shape, tokens: int) -> list[ExpertsConfig]:
    """Rows of a block, and whether ids are grouped first; tiles come from `tiles`."""
    mean = tokens * shape.slots / shape.experts
    configs = _configs_for_few(tokens, mean)
    if is_fp8(shape):
        return _fp8_configs(configs, mean)
    if 8 <= mean <= 96:
        configs.append(ExpertsConfig(64, 16, False))
    if mean >= 48:
        counts = {1, max(1, round(mean / SUBBLOCK_ROWS))}
        configs += [ExpertsConfig(SUBBLOCK_ROWS, 32, False, subblocks=n) for n in sorted(counts)]
    return configs


def _fp8_configs(for_few: list[ExpertsConfig], mean: float) -> list[ExpertsConfig]:
    """Activations of two terms while memory decides; then of one, float16 between the products.

    fp8 there, too, is faster, and 4.1 to 4.4% off in a layer of DeepSeek-V3's width, for 3.5 to
    3.7% (docs/results/kernels-gpu.md): how far off is too far is the tuner's to say.
    """
    if mean <= MOST_TWO_TERM_ROWS:
        return [replace(base, fp8_terms=2) for base in for_few]
    blocks = [(64, 16)] if mean <= 96 else [(64, 0)]
    if mean >= 48:
        blocks.append((SUBBLOCK_ROWS, 32))
    configs = [ExpertsConfig(rows, tail, False, float16_act=True) for rows, tail in blocks]
    return [ExpertsConfig(*blocks[0], False), *configs]


def _configs_for_few(tokens: int, mean: float) -> list[ExpertsConfig]:
    """Those for few rows an expert, `mean` of them on average."""
    configs = []
    if tokens <= MOST_DIRECT_TOKENS:
        direct = ExpertsConfig(max(16, power_of_two(tokens)), 0, True)
        configs.append(direct)
        if tokens <= MOST_FUSED_TOKENS:
            configs.append(replace(direct, fused_sum=True))
    if tokens > 4 and mean <= 24:
        configs += [ExpertsConfig(rows, 0, False) for rows in (16, 32) if rows <= max(16, 8 * mean)]
    return configs


def tiles(base: ExpertsConfig, shape: Shape, is_first: bool) -> Iterator[Tile]:
    """Tiles worth a try for one product of a config."""
    if base.fused_sum and not is_first:
        yield from (Tile(block_n, block_k, warps, 1) for block_n, block_k, warps in FUSED_SUM)
        return
    is_for_few = base.block_rows <= FEW_ROWS
    copies = (False, True) if is_fp8(shape) else (False,)
    for cut, swap_ab, use_tma in product(_cuts(base, shape, is_first), (True, False), copies):
        tile = Tile(*cut, swap_ab=swap_ab, use_tma=use_tma)
        if not _fits(tile, base, shape, is_first):
            continue
        yield tile
        if not is_for_few and not use_tma and not is_first:
            yield replace(tile, GROUP_M=4)


def _cuts(base: ExpertsConfig, shape: Shape, is_first: bool) -> Iterator[tuple[int, int, int, int]]:
    """BLOCK_N, BLOCK_K, num_warps and num_stages to try."""
    cuts = FEW if base.block_rows <= FEW_ROWS else MANY
    if is_fp8(shape) and is_first:
        cuts = FP8_FIRST
    elif is_fp8(shape):
        cuts = FLOAT16_SECOND if base.float16_act else FP8_SECOND
    halves = 2 if _itemsize(shape) == 4 else 1
    for block_n, block_k, warps, stages in cuts:
        yield block_n, block_k // halves, warps, stages


def _fits(tile: Tile, base: ExpertsConfig, shape: Shape, is_first: bool) -> bool:
    """Whether shared memory and registers hold the tile, and each warp has enough of it."""
    if base.fp8_terms == 2 and not tile.swap_ab:
        return False
    rows = (base.BLOCK_M + base.TAIL_M) * base.fp8_terms
    wide = tile.BLOCK_N * 2 if is_first else tile.BLOCK_N
    each_warp = 16 if tile.swap_ab else 8  # rows of the left operand, columns of the right
    if wide < each_warp * tile.num_warps:
        return False
    each = _itemsize(shape)
    shared = (wide * each + rows * max(each, 2)) * tile.BLOCK_K * tile.num_stages
    return shared <= SHARED_BYTES and rows * wide / (32 * tile.num_warps) <= MOST_SUMS


def _itemsize(shape: Shape) -> int:
    return int(getattr(torch, shape.dtype).itemsize)


def is_fp8(shape: Shape) -> bool:
    """Whether the weights are fp8 with block scales."""
    return shape.dtype.startswith("float8")
