"""What the tuner tries: each config has tiles, and fits the machine."""

from __future__ import annotations

import pytest

from leanmoe.kernels.triton.search_tiles import base_configs, tiles
from leanmoe.kernels.triton.tuned_tiles import Shape

V3 = Shape(256, 7168, 2048, 8, "bfloat16")


@pytest.mark.parametrize("tokens", [1, 7, 64, 500, 4096])
def test_what_is_tried_fits_the_machine(tokens: int) -> None:
    for shape in (V3, Shape(256, 7168, 2048, 8, "float8_e4m3fn"), Shape(64, 256, 48, 8, "float32")):
        for base in base_configs(shape, tokens):
            assert not base.is_direct or tokens <= base.BLOCK_M
            for is_first in (True, False):
                assert list(tiles(base, shape, is_first)), (shape, base)
