"""What the tuner tries: each way has tiles, and fits the machine."""

from __future__ import annotations

import pytest

from leanmoe.kernels.triton.search_tiles import tiles, ways
from leanmoe.kernels.triton.tuned_tiles import Shape

V3 = Shape(256, 7168, 2048, 8, "bfloat16")


@pytest.mark.parametrize("tokens", [1, 7, 64, 500, 4096])
def test_what_is_tried_fits_the_machine(tokens: int) -> None:
    for shape in (V3, Shape(256, 7168, 2048, 8, "float8_e4m3fn"), Shape(64, 256, 48, 8, "float32")):
        for way in ways(shape, tokens):
            assert not way.is_direct or tokens <= way.BLOCK_M
            for is_first in (True, False):
                assert list(tiles(way, shape, is_first)), (shape, way)
