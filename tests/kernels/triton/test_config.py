"""A config of the experts' programs: what its file must hold."""

from __future__ import annotations

from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.triton.config import ExpertsConfig, Tile


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("BLOCK_M", 24, "power of two"),
        ("BLOCK_M", 8, "power of two"),
        ("TAIL_M", -1, "power of two"),
        ("is_direct", 1, "must be bool"),
        ("gate_up", {"BLOCK_N": 3}, "must have the fields"),
        ("down", {**Tile().__dict__, "num_warps": 3}, "power of two"),
    ],
)
def test_a_bad_config_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        ExpertsConfig.from_json({**ExpertsConfig().to_json(), field: value}, "config")


def test_a_config_is_read_as_it_was_written() -> None:
    config = ExpertsConfig(32, 16, False, Tile(64, 128, GROUP_M=4), subblocks=2)
    assert ExpertsConfig.from_json(config.to_json(), "config") == config
