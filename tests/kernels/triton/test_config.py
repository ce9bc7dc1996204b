"""A config of the experts' programs: what its file must hold."""

from __future__ import annotations

from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.schema import from_json, to_json
from leanmoe.kernels.triton.config import ExpertsConfig, Tile


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("BLOCK_M", 24, "power of two"),
        ("BLOCK_M", 8, "power of two"),
        ("TAIL_M", -1, "power of two"),
        ("is_direct", 1, "true or false"),
        ("gate_up", {"BLOCK_N": 3}, "power of two"),
        ("down", {**Tile().__dict__, "num_warps": 3}, "power of two"),
    ],
)
def test_a_bad_config_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        from_json(ExpertsConfig, {**to_json(ExpertsConfig()), field: value}, "config")


def test_a_config_is_read_as_it_was_written() -> None:
    config = ExpertsConfig(32, 16, False, Tile(64, 128, GROUP_M=4), subblocks=2)
    assert from_json(ExpertsConfig, to_json(config), "config") == config
